/* libagnmpi.so: starts the Python of the environment that has built it, and hands each call to frameworks/capi.py. */
#include <Python.h>
#include <dlfcn.h>
#include <errno.h>
#include <fenv.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "agnmpi.h"
#include "environment.h" /* AGN_PYTHON, AGN_LIBPYTHON: the paths of Python and of its library */

enum { AGN_INT64 = 1 };
static PyObject *module; /* agnmpi.frameworks.capi, once Python has started */
static char text[8192];
static int returns;

/* End the job, unless errors return. */
static int failed(void)
{
    int on = 0, off = 0;
    if (returns)
        return 1;
    if (module) { /* where MPI_Abort alone does not do */
        PyGILState_STATE held = PyGILState_Ensure();
        Py_XDECREF(PyObject_CallMethod(module, "abort", NULL));
        PyGILState_Release(held);
    }
    MPI_Initialized(&on);
    MPI_Finalized(&off);
    if (on && !off)
        MPI_Abort(MPI_COMM_WORLD, 1);
    exit(1);
}

/* Say what is wrong where Python cannot. */
static int refuse(const char *call, const char *what, const char *more)
{
    int on = 0, rank = 0;
    MPI_Initialized(&on);
    if (on)
        MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    snprintf(text, sizeof text, "rank %d: agn_%s: %s%s", rank, call, what, more);
    fprintf(stderr, "agnmpi: %s\n", text);
    return failed();
}

static const char *start_python(void) /* what is wrong, or NULL */
{
    PyPreConfig before;
    PyConfig config;
    PyStatus status;
    /* PYTHONHOME may be that of another Python, as environment modules set it. */
    char *home = getenv("PYTHONHOME") ? strdup(getenv("PYTHONHOME")) : NULL;
    unsetenv("PYTHONHOME");
    PyPreConfig_InitPythonConfig(&before);
    before.utf8_mode = 1; /* the locale is the program's */
    before.configure_locale = before.coerce_c_locale = before.parse_argv = 0;
    status = Py_PreInitialize(&before);
    if (!PyStatus_Exception(status)) {
        PyConfig_InitPythonConfig(&config);
        /* So are signals, and the buffers of C's stdout. Python's own would be lost: it is not finalized. */
        config.install_signal_handlers = config.configure_c_stdio = config.buffered_stdio = config.parse_argv = 0;
        status = PyConfig_SetBytesString(&config, &config.program_name, AGN_PYTHON);
        if (!PyStatus_Exception(status))
            status = Py_InitializeFromConfig(&config);
        PyConfig_Clear(&config);
    }
    if (home)
        setenv("PYTHONHOME", home, 1);
    free(home);
    if (PyStatus_Exception(status))
        return status.err_msg ? status.err_msg : "it has exited";
    PyEval_SaveThread(); /* so that a thread may serve while the solver computes */
    return NULL;
}

static const char *start(void)
{
    const char *error = NULL;
    PyGILState_STATE held;
    if (access(AGN_PYTHON, X_OK)) /* without it, another's packages would be found, or none */
        return strerror(errno);
    /* Extension modules find Python's symbols also where a program loads this library by dlopen. */
    if (!dlopen(AGN_LIBPYTHON, RTLD_NOW | RTLD_GLOBAL))
        return dlerror();
    if (!Py_IsInitialized() && (error = start_python()))
        return error;
    held = PyGILState_Ensure();
    if (!(module = PyImport_ImportModule("agnmpi.frameworks.capi"))) {
        PyErr_Print();
        error = "agnmpi cannot be imported, as said above";
    }
    PyGILState_Release(held);
    return error;
}

/* What is the program's, and Python would change. */
struct kept {
    fenv_t traps;            /* solvers trap division by zero; NumPy divides by it, and looks at the result */
    struct sigaction at_int; /* Python's module signal takes SIGINT, whoever imports it */
};

static void keep(struct kept *kept)
{
    feholdexcept(&kept->traps);
    sigaction(SIGINT, NULL, &kept->at_int);
}

static void give_back(const struct kept *kept)
{
    sigaction(SIGINT, &kept->at_int, NULL);
    fesetenv(&kept->traps);
}

struct array {
    const void *data;
    int ndim;
    const int64_t *shape;
    int type, flags; /* PyBUF_READ or PyBUF_WRITE */
};

/* (memory, shape, dtype) of a struct array. What cannot be has no memory, and Python refuses it. */
static PyObject *array(void *given)
{
    const struct array *a = given;
    const char *dtype = a->type == AGN_FLOAT ? "f4" : a->type == AGN_DOUBLE ? "f8" : a->type == AGN_INT64 ? "i8" : "";
    Py_ssize_t bytes = a->data ? (a->type == AGN_FLOAT ? 4 : 8) : 0;
    int i, ndim = a->ndim < 0 || !a->shape ? 0 : a->ndim;
    PyObject *shape = PyTuple_New(ndim);
    for (i = 0; shape && i < ndim; i++) {
        bytes = a->shape[i] < 0 || (bytes && a->shape[i] > PY_SSIZE_T_MAX / bytes) ? 0 : bytes * a->shape[i];
        PyTuple_SET_ITEM(shape, i, PyLong_FromLongLong(a->shape[i]));
    }
    return Py_BuildValue("(NNs)", PyMemoryView_FromMemory(bytes ? (char *)a->data : "", bytes, a->flags), shape, dtype);
}

/* A function of capi.py, with arguments as Py_BuildValue has them. */
static int call(const char *name, const char *format, ...)
{
    va_list values;
    struct kept kept;
    PyGILState_STATE held;
    PyObject *function, *given, *answer, *said;
    long code;
    if (!module)
        return refuse(name, "no run is open: call agn_open first", "");
    keep(&kept);
    held = PyGILState_Ensure();
    va_start(values, format);
    function = PyObject_GetAttrString(module, name);
    given = Py_VaBuildValue(format, values);
    va_end(values);
    answer = function && given ? PyObject_CallObject(function, given) : NULL;
    code = answer ? PyLong_AsLong(answer) : -1;
    if (code) {
        said = code == 1 ? PyObject_CallMethod(module, "error", NULL) : NULL;
        if (said)
            snprintf(text, sizeof text, "%s", PyUnicode_AsUTF8(said));
        else
            PyErr_Print(); /* no memory, or text that is not UTF-8 */
        Py_XDECREF(said);
    }
    Py_XDECREF(answer);
    Py_XDECREF(given);
    Py_XDECREF(function);
    PyGILState_Release(held);
    give_back(&kept);
    return code == 0 ? 0 : code == 1 ? failed() : refuse(name, "Python failed, as said above", "");
}

int agn_open(const char *spec, MPI_Fint comm, int period, const char *options)
{
    struct kept kept;
    const char *error;
    keep(&kept);
    error = module ? NULL : start();
    give_back(&kept);
    if (error)
        return refuse("open: Python cannot start", error,
                      " (" AGN_PYTHON "; where it has moved, build the library again: python -m agnmpi capi DIR)");
    return call("open", "(sLisK)", spec, (long long)comm, period, options,
                (unsigned long long)(uintptr_t)PMPI_Get_library_version);
}

/* For agnmpi.f90. */
int agn_open_f(const char *spec, const MPI_Fint *comm, int period, const char *options)
{
    return agn_open(spec, *comm, period, options);
}

int agn_serve(void) { return call("serve", "()"); }

int agn_put(const void *x, int x_ndim, const int64_t *x_shape, const void *y, int y_ndim, const int64_t *y_shape,
            int type)
{
    return call("put", "(O&O&)", array, &(struct array){x, x_ndim, x_shape, type, PyBUF_READ}, array,
                &(struct array){y, y_ndim, y_shape, type, PyBUF_READ});
}

int agn_learn(double budget, int64_t *taken)
{
    int64_t steps = 0;
    int code = call("learn", "(dO&)", budget, array, &(struct array){&steps, 0, NULL, AGN_INT64, PyBUF_WRITE});
    if (taken)
        *taken = steps;
    return code;
}

int agn_predict(const void *x, int x_ndim, const int64_t *x_shape, void *y, int y_ndim, const int64_t *y_shape,
                int type)
{
    return call("predict", "(O&O&)", array, &(struct array){x, x_ndim, x_shape, type, PyBUF_READ}, array,
                &(struct array){y, y_ndim, y_shape, type, PyBUF_WRITE});
}

int agn_pull(int *arrived)
{
    int64_t answer = 0;
    int code = call("pull", "(O&)", array, &(struct array){&answer, 0, NULL, AGN_INT64, PyBUF_WRITE});
    if (arrived)
        *arrived = answer != 0;
    return code;
}

int agn_params(const char *name, void *values, int64_t size, int type)
{
    return call("params", "(sO&)", name, array, &(struct array){values, 1, &size, type, PyBUF_WRITE});
}

int agn_step(int64_t *own, int64_t *all, double *loss)
{
    int64_t steps[2] = {0, 0}, two = 2;
    double last = 0;
    int code = call("step", "(O&O&)", array, &(struct array){steps, 1, &two, AGN_INT64, PyBUF_WRITE}, array,
                    &(struct array){&last, 0, NULL, AGN_DOUBLE, PyBUF_WRITE});
    if (own)
        *own = steps[0];
    if (all)
        *all = steps[1];
    if (loss)
        *loss = last;
    return code;
}

int agn_done(int *done)
{
    int64_t answer = 0;
    int code;
    if (!done)
        return refuse("done", "done is NULL", "");
    code = call("done", "(O&)", array, &(struct array){&answer, 0, NULL, AGN_INT64, PyBUF_WRITE});
    *done = answer != 0;
    return code;
}

int agn_stop(void) { return call("stop", "()"); }

int agn_save(const char *path) { return call("save", "(s)", path); }

int agn_close(const char *path) { return call("close", "(s)", path); }

const char *agn_error(void) { return text; }

void agn_errors_return(int yes) { returns = yes; }
