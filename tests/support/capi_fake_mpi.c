/* A second MPI library in one process, to be loaded before the first. */
#include <string.h>

int PMPI_Get_library_version(char *text, int *length)
{
    strcpy(text, "Fake MPI 1.0, of a test");
    *length = (int)strlen(text);
    return 0;
}
