/* agnmpi from C: a solver trains a surrogate of itself while it runs; agnmpi.insitu.Run says more of each call.
 *
 *     agn_open("surrogate.py:Heat", MPI_Comm_c2f(comm), 10, "steps = 9000");   // after MPI_Init, collective
 *     while (agn_done(&done), !done) {                  // the same answer on all ranks, in the same time step
 *         step();
 *         agn_put(x, 2, (int64_t[]){m, 3}, y, 1, (int64_t[]){m}, AGN_DOUBLE);
 *         agn_learn(0.02, NULL);                        // at most 2 % of the time since the last call
 *     }
 *     agn_close("surrogate.safetensors");               // collective
 *
 * Each call returns 0. An error is printed with its rank and ends the job by MPI_Abort, as MPI's own do; after
 * agn_errors_return(1) such a call returns 1 instead. One run at a time; one thread at a time calls.
 *
 * Arrays are contiguous, of AGN_FLOAT or AGN_DOUBLE, in the order of C: the last index runs fastest. `ndim` lengths
 * stand in `shape`; the first is m, the number of samples. Nothing is kept of them when a call returns.
 */
#ifndef AGNMPI_H
#define AGNMPI_H

#include <mpi.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { AGN_FLOAT = 4, AGN_DOUBLE = 8 };

/* Begin a run; collective over `comm`. `spec`: FILE.py:NAME of the surrogate's class. `period`: steps between
 * exchanges. `options`: NULL, or others of agnmpi.insitu.Run, such as "steps = 9000, batch = 32, center = 'thread'";
 * also optimizer = 'adam' and rate = 0.001. options = {width = 16} are for the surrogate, solver is an MPI_Fint. */
int agn_open(const char *spec, MPI_Fint comm, int period, const char *options);

/* With center = 'rank', at rank 0: serve until all others have called agn_close. */
int agn_serve(void);

/* Offer samples of this rank: those that are kept are copied; with "feeds = true" sent to the ranks that train. */
int agn_put(const void *x, int x_ndim, const int64_t *x_shape, const void *y, int y_ndim, const int64_t *y_shape,
            int type);

/* Train for at most a share `budget` of the time since the last call. `taken`: NULL, or for the number of steps. */
int agn_learn(double budget, int64_t *taken);

/* Predict y from x by the newest center of this rank. */
int agn_predict(const void *x, int x_ndim, const int64_t *x_shape, void *y, int y_ndim, const int64_t *y_shape,
                int type);

/* On a rank opened with "reads = true" or "feeds = true", which does not train: ask for the newest center. `arrived`:
 * NULL, or for whether one has come since the last call. */
int agn_pull(int *arrived);

/* Copy the `size` numbers of a parameter, in the order of C. */
int agn_params(const char *name, void *values, int64_t size, int type);

/* Steps of this rank, of all ranks as of the last exchange, and this rank's last loss; each may be NULL. */
int agn_step(int64_t *own, int64_t *all, double *loss);

/* Whether all steps are taken, or a rank has called agn_stop. Every rank of the solver asks once in each time step. */
int agn_done(int *done);
int agn_stop(void);

/* Write the newest center of this rank to a safetensors file. */
int agn_save(const char *path);

/* End the run; collective. `path`: NULL, or where the first rank writes the final center. Predictions go on. */
int agn_close(const char *path);

/* What the last error was, "" if there was none; valid until the next call. */
const char *agn_error(void);

/* 1: calls return 1 after an error; 0, as at first: they end the job. */
void agn_errors_return(int yes);

#ifdef __cplusplus
}
#endif
#endif
