/* The heat equation on a plate, and a surrogate of it that is trained while it runs: heat.py, in C.
 *
 *     mpiexec -n 3 ./heat_c [GRID [TIME_STEPS [TRAIN [FILE]]]]
 *
 * TRAIN: training steps over all ranks; 0: the solver alone. FILE: for draw.py. Started where surrogate.py is found.
 * The lines with agn_ are all that the training changes.
 */
#include <agnmpi.h>
#include <math.h>
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* dT/dt = ∇²T on the unit square, T = 0 on its edge: explicit steps, this rank's rows with a halo at each side. */
struct plate {
    MPI_Comm comm;
    int rank, size, n, first, rows, up, down;
    double h, dt, t, *field, *next; /* (rows + 2, n + 2) */
};

static struct plate make(MPI_Comm world, int n)
{
    struct plate p = {.n = n, .h = 1.0 / (n + 1)};
    int open_ended = 0, i, j, k;
    MPI_Comm_size(world, &p.size);
    MPI_Cart_create(world, 1, &p.size, &open_ended, 0, &p.comm); /* the solver's own */
    MPI_Comm_rank(p.comm, &p.rank);
    MPI_Cart_shift(p.comm, 0, 1, &p.up, &p.down);
    p.first = p.rank * n / p.size;
    p.rows = (p.rank + 1) * n / p.size - p.first;
    p.dt = p.h * p.h / 5;
    p.field = calloc((size_t)(p.rows + 2) * (n + 2), sizeof(double));
    p.next = calloc((size_t)(p.rows + 2) * (n + 2), sizeof(double));
    for (i = 1; i <= p.rows; i++)
        for (j = 1; j <= n; j++)
            for (k = 0; k < 2; k++) {
                double x = j * p.h - (k ? 0.6 : 0.3), y = (p.first + i) * p.h - (k ? 0.75 : 0.3);
                p.field[i * (n + 2) + j] += 5 * exp(-(x * x + y * y) / 0.03);
            }
    return p;
}

static void step(struct plate *p)
{
    int w = p->n + 2, i, j;
    double *f = p->field, *next = p->next;
    MPI_Sendrecv(f + w, w, MPI_DOUBLE, p->up, 0, f + (p->rows + 1) * w, w, MPI_DOUBLE, p->down, 0, p->comm,
                 MPI_STATUS_IGNORE);
    MPI_Sendrecv(f + p->rows * w, w, MPI_DOUBLE, p->down, 1, f, w, MPI_DOUBLE, p->up, 1, p->comm, MPI_STATUS_IGNORE);
    for (i = 1; i <= p->rows; i++)
        for (j = 1; j <= p->n; j++) {
            const double *c = f + i * w + j;
            next[i * w + j] = *c + p->dt / (p->h * p->h) * (c[-w] + c[w] + c[-1] + c[1] - 4 * *c);
        }
    p->field = next;
    p->next = f;
    p->t += p->dt;
}

/* All places of this rank at the time now, as x (m, 3) = (x, y, t/end), and the temperatures there, y (m,). */
static int64_t samples(const struct plate *p, double end, double *x, double *y)
{
    int64_t m = 0;
    for (int i = 1; i <= p->rows; i++)
        for (int j = 1; j <= p->n; j++, m++) {
            x[3 * m] = j * p->h;
            x[3 * m + 1] = (p->first + i) * p->h;
            x[3 * m + 2] = p->t / end;
            y[m] = p->field[i * (p->n + 2) + j];
        }
    return m;
}

/* The values y (m,) of all ranks, at rank 0. */
static void gather(const struct plate *p, const double *y, double *whole)
{
    int counts[p->size], begins[p->size];
    for (int r = 0; r < p->size; r++) {
        begins[r] = r * p->n / p->size * p->n;
        counts[r] = (r + 1) * p->n / p->size * p->n - begins[r];
    }
    MPI_Gatherv(y, counts[p->rank], MPI_DOUBLE, whole, counts, begins, MPI_DOUBLE, 0, p->comm);
}

int main(int argc, char **argv)
{
    int n = argc > 1 ? atoi(argv[1]) : 48, time_steps = argc > 2 ? atoi(argv[2]) : 600;
    int train = argc > 3 ? atoi(argv[3]) : 9000, done = 0;
    MPI_Init(&argc, &argv);
    struct plate p = make(MPI_COMM_WORLD, n);
    double end = time_steps * p.dt, sums[4] = {0, 0, 0, 0}; /* samples, their sum and squares; squared errors */
    int64_t m = (int64_t)p.rows * n, steps, all;
    double *x = malloc(3 * m * sizeof *x), *y = malloc(m * sizeof *y), *predicted = malloc(m * sizeof *y);
    double *seen_x = malloc(15 * m * sizeof *x), *seen_y = malloc(5 * m * sizeof *y), *seen = malloc(5 * m * sizeof *y);
    double *truth = calloc((size_t)n * n, sizeof *y), *surrogate = calloc((size_t)n * n, sizeof *y);
    char options[80];
    snprintf(options, sizeof options, "steps = %d, rate = 0.003, capacity = 20000", train);
    if (train)
        agn_open("surrogate.py:Heat", MPI_Comm_c2f(MPI_COMM_WORLD), 10, options);
    for (int k = 1; k <= time_steps; k++) {
        step(&p);
        samples(&p, end, x, y);
        if (train) {
            agn_put(x, 2, (int64_t[]){m, 3}, y, 1, (int64_t[]){m}, AGN_DOUBLE);
            agn_learn(0.02, NULL); /* at most 2 % of the solver's time */
        }
        if (k % (time_steps / 5) == 0 && k / (time_steps / 5) <= 5) { /* for the error: at some times */
            memcpy(seen_x + (k / (time_steps / 5) - 1) * 3 * m, x, 3 * m * sizeof *x);
            memcpy(seen_y + (k / (time_steps / 5) - 1) * m, y, m * sizeof *y);
        }
    }
    gather(&p, y, truth);
    if (p.rank == 0) {
        uint64_t hash = 14695981039346656037u; /* FNV-1a of the bits */
        for (size_t i = 0; i < (size_t)n * n * sizeof *truth; i++)
            hash = (hash ^ ((unsigned char *)truth)[i]) * 1099511628211u;
        printf("plate %016llx, %d steps\n", (unsigned long long)hash, time_steps);
        fflush(stdout);
    }
    if (train) {
        agn_step(&steps, NULL, NULL);
        printf("rank %d took %d steps while the plate was computed\n", p.rank, (int)steps);
        while (agn_done(&done), !done) /* the plate is ready: what is left of the steps */
            agn_learn(1.0, NULL);
        agn_close("heat_c.safetensors");
        agn_predict(seen_x, 2, (int64_t[]){5 * m, 3}, seen, 1, (int64_t[]){5 * m}, AGN_DOUBLE);
        for (int64_t i = 0; i < 5 * m; i++) {
            sums[0] += 1;
            sums[1] += seen_y[i];
            sums[2] += seen_y[i] * seen_y[i];
            sums[3] += (seen[i] - seen_y[i]) * (seen[i] - seen_y[i]);
        }
        MPI_Allreduce(MPI_IN_PLACE, sums, 4, MPI_DOUBLE, MPI_SUM, p.comm);
        agn_predict(x, 2, (int64_t[]){m, 3}, predicted, 1, (int64_t[]){m}, AGN_DOUBLE);
        gather(&p, predicted, surrogate);
        agn_step(NULL, &all, NULL);
    }
    if (train && p.rank == 0) {
        double mean = sums[1] / sums[0], variance = sums[2] / sums[0] - mean * mean;
        FILE *file = argc > 4 ? fopen(argv[4], "wb") : NULL;
        for (int i = n / 8; i < n; i += n / 4)
            printf("at (%.2f, %.2f): truth %6.3f, surrogate %6.3f\n", (i + 1) * p.h, (i + 1) * p.h, truth[i * n + i],
                   surrogate[i * n + i]);
        printf("error of the surrogate: %.3f of the mean's, after %d steps\n", sqrt(sums[3] / sums[0] / variance),
               (int)all);
        if (file) {
            fwrite(truth, sizeof *truth, (size_t)n * n, file);
            fwrite(surrogate, sizeof *surrogate, (size_t)n * n, file);
            fclose(file);
        }
    }
    MPI_Finalize();
    return 0;
}
