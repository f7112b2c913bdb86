/* Calls of libagnmpi.so, as a solver makes them that traps floating-point errors and keeps its handlers.
 * Its main is called by capi_host.c, from a shared library that was loaded for itself. Arguments: MODE SURROGATES. */
#include <agnmpi.h>
#include <fenv.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int rank, size;

static void check(int holds, const char *what)
{
    if (!holds) {
        fprintf(stderr, "rank %d: not so: %s\n", rank, what);
        MPI_Abort(MPI_COMM_WORLD, 3);
    }
}

static void refused(int code, const char *what)
{
    check(code == 1, what);
    if (!strstr(agn_error(), what)) {
        fprintf(stderr, "rank %d: %s\n", rank, agn_error());
        check(0, what);
    }
}

static void train(float target)
{
    float y[4] = {target, target, target, target}, x[8] = {0};
    int done;
    while (agn_done(&done), !done) {
        agn_put(x, 2, (int64_t[]){4, 2}, y, 1, (int64_t[]){4}, AGN_FLOAT);
        agn_learn(1e9, NULL);
    }
}

static void calls(const char *spec)
{
    int64_t own, all, sum, taken;
    float w[3];
    double x[4] = {1, 2, 3, 4}, y[2] = {0, 0}, loss;
    agn_errors_return(1);
    refused(agn_put(x, 1, (int64_t[]){4}, y, 1, (int64_t[]){2}, AGN_DOUBLE), "no run is open");
    refused(agn_open(spec, MPI_Comm_c2f(MPI_COMM_WORLD), 0, NULL), "period must be at least 1, not 0");
    refused(agn_open(spec, MPI_Comm_c2f(MPI_COMM_WORLD), 2, "stepps = 4"), "there is no option stepps");
    refused(agn_open(spec, MPI_Comm_c2f(MPI_COMM_WORLD), 2, "steps ="), "as in TOML");
    refused(agn_open(spec, MPI_Comm_c2f(MPI_COMM_NULL), 2, NULL), "comm must be an intracommunicator");
    agn_errors_return(0);
    agn_open(spec, MPI_Comm_c2f(MPI_COMM_WORLD), 2,
             "steps = 200, batch = 2, optimizer = 'sgd', rate = 0.5, options = {size = 3}, center = 'thread'");
    train(3);
    agn_close("capi.safetensors");
    agn_step(&own, &all, &loss);
    MPI_Allreduce(&own, &sum, 1, MPI_INT64_T, MPI_SUM, MPI_COMM_WORLD);
    check(all == 200 && sum == 200 && loss >= 0, "each of 200 steps is taken once");
    agn_params("w", w, 3, AGN_FLOAT);
    check(w[0] > 0 && w[0] == w[1] && w[1] == w[2], "w has moved to y");
    printf("w %.9g\n", w[0]);
    agn_predict(x, 2, (int64_t[]){2, 2}, y, 1, (int64_t[]){2}, AGN_DOUBLE);
    check(y[0] == 1 + 10 * 2 && y[1] == 3 + 10 * 4, "a row is a sample");
    agn_errors_return(1);
    refused(agn_params("v", w, 3, AGN_FLOAT), "there is no parameter 'v'; there are w");
    refused(agn_params("w", w, 2, AGN_FLOAT), "has 3 numbers");
    refused(agn_predict(x, 2, (int64_t[]){2, 2}, y, 1, (int64_t[]){1}, AGN_DOUBLE), "has shape (2,), y has (1,)");
    refused(agn_predict(x, 2, (int64_t[]){2, 2}, y, 1, (int64_t[]){2}, 16), "must be AGN_FLOAT or AGN_DOUBLE");
    refused(agn_put(NULL, 1, (int64_t[]){2}, y, 1, (int64_t[]){2}, AGN_DOUBLE), "x is NULL");
    refused(agn_put(x, 1, (int64_t[]){-1}, y, 1, (int64_t[]){2}, AGN_DOUBLE), "cannot be");
    refused(agn_put(x, 1, (int64_t[]){2}, y, 1, (int64_t[]){2}, AGN_DOUBLE), "put after close");
    refused(agn_learn(0.1, &taken), "learn after close");
    refused(agn_done(NULL), "agn_done: done is NULL");
    refused(agn_save(NULL), "agn_save: ValueError: path is NULL");
    refused(agn_save("nowhere/w.safetensors"), "agn_save: FileNotFoundError: [Errno 2] No such file or directory: 'nowhere/w.");
    check(!strchr(agn_error(), '\n'), "a path that cannot be written is said in a line");
    agn_errors_return(0);
    agn_open(spec, MPI_Comm_c2f(MPI_COMM_WORLD), 3, "steps = 50, batch = 1, center = 'rank'");
    if (rank == 0)
        agn_serve();
    else
        train(1);
    agn_save(rank == 0 ? "again.safetensors" : "other.safetensors");
    agn_close(NULL);
}

int main(int argc, char **argv)
{
    const char *mode = argv[1];
    char spec[4096];
    int level, set;
    MPI_Errhandler handler;
    struct sigaction before, after;
    snprintf(spec, sizeof spec, "%s:%s", argv[2], strcmp(mode, "fails") ? "Places" : "Raises");
    if (!strcmp(mode, "early"))
        return agn_open(spec, 0, 10, NULL); /* which does not come back */
    feenableexcept(FE_DIVBYZERO | FE_INVALID | FE_OVERFLOW);
    MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &level);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    sigaction(SIGINT, NULL, &before);
    if (!strcmp(mode, "calls"))
        calls(spec);
    else { /* rank 1 fails in its own code, the others wait for it */
        agn_open(spec, MPI_Comm_c2f(MPI_COMM_WORLD), 10, "batch = 1, steps = 1000000");
        while (rank == 1) {
            double sample = 1;
            agn_put(&sample, 1, (int64_t[]){1}, &sample, 1, (int64_t[]){1}, AGN_DOUBLE);
            agn_learn(1e9, NULL);
        }
        agn_close(NULL);
    }
    check(fegetexcept() == (FE_DIVBYZERO | FE_INVALID | FE_OVERFLOW), "traps are as they were");
    MPI_Comm_get_errhandler(MPI_COMM_WORLD, &handler);
    check(handler == MPI_ERRORS_ARE_FATAL, "MPI's errors are fatal, as they were");
    sigaction(SIGINT, NULL, &after);
    check(after.sa_handler == before.sa_handler, "SIGINT is handled as it was");
    set = getenv("PYTHONHOME") && !strcmp(getenv("PYTHONHOME"), "/nowhere");
    check(set, "PYTHONHOME is as it was");
    printf("rank %d of %d: as wanted\n", rank, size);
    MPI_Finalize();
    return 0;
}
