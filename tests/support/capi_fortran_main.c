/* A program in C with a solver in Fortran: argument SURROGATES. */
#include <mpi.h>
#include <stdio.h>
#include <string.h>

void in_fortran(const MPI_Fint *comm, const char *spec, int length);

int main(int argc, char **argv)
{
    MPI_Fint comm;
    MPI_Init(&argc, &argv);
    comm = MPI_Comm_c2f(MPI_COMM_WORLD);
    in_fortran(&comm, argv[1], (int)strlen(argv[1]));
    puts("as wanted");
    MPI_Finalize();
    return 0;
}
