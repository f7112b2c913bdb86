!> agnmpi from Fortran: a solver trains a surrogate of itself while it runs. agnmpi.h describes the calls.
!>
!>     call agn_open("surrogate.py:Heat", comm%mpi_val, 10, "steps = 9000")  ! after MPI_Init, collective
!>     do while (.not. agn_done())            ! the same answer on all ranks, in the same time step
!>         call step()
!>         call agn_put(x, y)                 ! x(3, m), y(m): in Python, and in C, x (m, 3), y (m,)
!>         call agn_learn(0.02d0)             ! at most 2 % of the time since the last call
!>     end do
!>     call agn_close("surrogate.safetensors")  ! collective
!>
!> Compile this file with the solver, and link with -lagnmpi. Samples are x(p, m), and y(m) or y(q, m), all of
!> real(c_float) or all of real(c_double): the index of the sample comes last, in Python first. Parameters come in the
!> order of C. An error ends the job; after agn_errors_return(.true.) `ierr` is 1 then, else 0.
module agnmpi
    use, intrinsic :: iso_c_binding
    implicit none
    private
    public :: agn_open, agn_serve, agn_put, agn_learn, agn_predict, agn_params, agn_step, agn_done, agn_stop, agn_save
    public :: agn_pull, agn_close, agn_error, agn_errors_return

    integer(c_int), parameter :: float = 4, double = 8

    interface agn_put
        module procedure put_float_1, put_float_2, put_double_1, put_double_2
    end interface
    interface agn_predict
        module procedure predict_float_1, predict_float_2, predict_double_1, predict_double_2
    end interface
    interface agn_params
        module procedure params_float, params_double
    end interface

    interface
        function c_open(spec, comm, period, options) bind(C, name="agn_open_f") result(code)
            import
            character(kind=c_char), intent(in) :: spec(*), options(*)
            type(*), intent(in) :: comm  ! an MPI_Fint, which is an INTEGER, of whatever kind that is
            integer(c_int), value :: period
            integer(c_int) :: code
        end function
        function c_serve() bind(C, name="agn_serve") result(code)
            import
            integer(c_int) :: code
        end function
        function c_put(x, x_ndim, x_shape, y, y_ndim, y_shape, kind) bind(C, name="agn_put") result(code)
            import
            type(*), intent(in) :: x(*), y(*)
            integer(c_int), value :: x_ndim, y_ndim, kind
            integer(c_int64_t), intent(in) :: x_shape(*), y_shape(*)
            integer(c_int) :: code
        end function
        function c_learn(budget, taken) bind(C, name="agn_learn") result(code)
            import
            real(c_double), value :: budget
            integer(c_int64_t), intent(out) :: taken
            integer(c_int) :: code
        end function
        function c_predict(x, x_ndim, x_shape, y, y_ndim, y_shape, kind) bind(C, name="agn_predict") result(code)
            import
            type(*), intent(in) :: x(*)
            type(*) :: y(*)
            integer(c_int), value :: x_ndim, y_ndim, kind
            integer(c_int64_t), intent(in) :: x_shape(*), y_shape(*)
            integer(c_int) :: code
        end function
        function c_params(name, values, length, kind) bind(C, name="agn_params") result(code)
            import
            character(kind=c_char), intent(in) :: name(*)
            type(*) :: values(*)
            integer(c_int64_t), value :: length
            integer(c_int), value :: kind
            integer(c_int) :: code
        end function
        function c_step(own, all, loss) bind(C, name="agn_step") result(code)
            import
            integer(c_int64_t), intent(out) :: own, all
            real(c_double), intent(out) :: loss
            integer(c_int) :: code
        end function
        function c_done(done) bind(C, name="agn_done") result(code)
            import
            integer(c_int), intent(out) :: done
            integer(c_int) :: code
        end function
        function c_pull(arrived) bind(C, name="agn_pull") result(code)
            import
            integer(c_int), intent(out) :: arrived
            integer(c_int) :: code
        end function
        function c_stop() bind(C, name="agn_stop") result(code)
            import
            integer(c_int) :: code
        end function
        function c_save(path) bind(C, name="agn_save") result(code)
            import
            character(kind=c_char), intent(in) :: path(*)
            integer(c_int) :: code
        end function
        function c_close(path) bind(C, name="agn_close") result(code)
            import
            type(c_ptr), value :: path
            integer(c_int) :: code
        end function
        function c_error() bind(C, name="agn_error") result(text)
            import
            type(c_ptr) :: text
        end function
        subroutine c_errors_return(yes) bind(C, name="agn_errors_return")
            import
            integer(c_int), value :: yes
        end subroutine
    end interface

contains

    subroutine agn_open(spec, comm, period, options, ierr)
        character(*), intent(in) :: spec
        integer, intent(in) :: comm, period
        character(*), intent(in), optional :: options
        integer, intent(out), optional :: ierr
        if (present(options)) then
            call tell(c_open(c_string(spec), comm, int(period, c_int), c_string(options)), ierr)
        else
            call tell(c_open(c_string(spec), comm, int(period, c_int), c_string("")), ierr)
        end if
    end subroutine

    subroutine agn_serve(ierr)
        integer, intent(out), optional :: ierr
        call tell(c_serve(), ierr)
    end subroutine

    !> taken: steps.
    subroutine agn_learn(budget, taken, ierr)
        real(c_double), intent(in) :: budget
        integer, intent(out), optional :: taken, ierr
        integer(c_int64_t) :: steps
        call tell(c_learn(budget, steps), ierr)
        if (present(taken)) taken = int(steps)
    end subroutine

    !> Steps of this rank, of all as of the last exchange, and this rank's last loss.
    subroutine agn_step(own, all, loss, ierr)
        integer(c_int64_t), intent(out), optional :: own, all
        real(c_double), intent(out), optional :: loss
        integer, intent(out), optional :: ierr
        integer(c_int64_t) :: steps(2)
        real(c_double) :: last
        call tell(c_step(steps(1), steps(2), last), ierr)
        if (present(own)) own = steps(1)
        if (present(all)) all = steps(2)
        if (present(loss)) loss = last
    end subroutine

    logical function agn_done(ierr) result(done)
        integer, intent(out), optional :: ierr
        integer(c_int) :: answer
        call tell(c_done(answer), ierr)
        done = answer /= 0
    end function

    subroutine agn_pull(arrived, ierr)
        logical, intent(out), optional :: arrived
        integer, intent(out), optional :: ierr
        integer(c_int) :: answer
        call tell(c_pull(answer), ierr)
        if (present(arrived)) arrived = answer /= 0
    end subroutine

    subroutine agn_stop(ierr)
        integer, intent(out), optional :: ierr
        call tell(c_stop(), ierr)
    end subroutine

    subroutine agn_save(path, ierr)
        character(*), intent(in) :: path
        integer, intent(out), optional :: ierr
        call tell(c_save(c_string(path)), ierr)
    end subroutine

    subroutine agn_close(path, ierr)
        character(*), intent(in), optional :: path
        integer, intent(out), optional :: ierr
        character(kind=c_char, len=:), allocatable, target :: given
        if (present(path)) then
            given = c_string(path)
            call tell(c_close(c_loc(given)), ierr)
        else
            call tell(c_close(c_null_ptr), ierr)
        end if
    end subroutine

    function agn_error() result(text)
        character(:), allocatable :: text
        character(kind=c_char), pointer :: bytes(:)
        integer :: i
        call c_f_pointer(c_error(), bytes, [8192])
        text = ""
        do i = 1, size(bytes)
            if (bytes(i) == c_null_char) exit
            text = text // bytes(i)
        end do
    end function

    subroutine agn_errors_return(yes)
        logical, intent(in) :: yes
        call c_errors_return(merge(1_c_int, 0_c_int, yes))
    end subroutine

    subroutine put_float_1(x, y, ierr)
        real(c_float), intent(in), contiguous :: x(:, :), y(:)
        integer, intent(out), optional :: ierr
        call tell(c_put(x, 2_c_int, backwards(shape(x, c_int64_t)), &
            y, 1_c_int, [size(y, kind=c_int64_t)], float), ierr)
    end subroutine

    subroutine put_float_2(x, y, ierr)
        real(c_float), intent(in), contiguous :: x(:, :), y(:, :)
        integer, intent(out), optional :: ierr
        call tell(c_put(x, 2_c_int, backwards(shape(x, c_int64_t)), &
            y, 2_c_int, backwards(shape(y, c_int64_t)), float), ierr)
    end subroutine

    subroutine predict_float_1(x, y, ierr)
        real(c_float), intent(in), contiguous :: x(:, :)
        real(c_float), intent(inout), contiguous :: y(:)
        integer, intent(out), optional :: ierr
        call tell(c_predict(x, 2_c_int, backwards(shape(x, c_int64_t)), &
            y, 1_c_int, [size(y, kind=c_int64_t)], float), ierr)
    end subroutine

    subroutine predict_float_2(x, y, ierr)
        real(c_float), intent(in), contiguous :: x(:, :)
        real(c_float), intent(inout), contiguous :: y(:, :)
        integer, intent(out), optional :: ierr
        call tell(c_predict(x, 2_c_int, backwards(shape(x, c_int64_t)), &
            y, 2_c_int, backwards(shape(y, c_int64_t)), float), ierr)
    end subroutine

    subroutine params_float(name, values, ierr)
        character(*), intent(in) :: name
        real(c_float), intent(inout), contiguous :: values(:)
        integer, intent(out), optional :: ierr
        call tell(c_params(c_string(name), values, size(values, kind=c_int64_t), float), ierr)
    end subroutine

    subroutine put_double_1(x, y, ierr)
        real(c_double), intent(in), contiguous :: x(:, :), y(:)
        integer, intent(out), optional :: ierr
        call tell(c_put(x, 2_c_int, backwards(shape(x, c_int64_t)), &
            y, 1_c_int, [size(y, kind=c_int64_t)], double), ierr)
    end subroutine

    subroutine put_double_2(x, y, ierr)
        real(c_double), intent(in), contiguous :: x(:, :), y(:, :)
        integer, intent(out), optional :: ierr
        call tell(c_put(x, 2_c_int, backwards(shape(x, c_int64_t)), &
            y, 2_c_int, backwards(shape(y, c_int64_t)), double), ierr)
    end subroutine

    subroutine predict_double_1(x, y, ierr)
        real(c_double), intent(in), contiguous :: x(:, :)
        real(c_double), intent(inout), contiguous :: y(:)
        integer, intent(out), optional :: ierr
        call tell(c_predict(x, 2_c_int, backwards(shape(x, c_int64_t)), &
            y, 1_c_int, [size(y, kind=c_int64_t)], double), ierr)
    end subroutine

    subroutine predict_double_2(x, y, ierr)
        real(c_double), intent(in), contiguous :: x(:, :)
        real(c_double), intent(inout), contiguous :: y(:, :)
        integer, intent(out), optional :: ierr
        call tell(c_predict(x, 2_c_int, backwards(shape(x, c_int64_t)), &
            y, 2_c_int, backwards(shape(y, c_int64_t)), double), ierr)
    end subroutine

    subroutine params_double(name, values, ierr)
        character(*), intent(in) :: name
        real(c_double), intent(inout), contiguous :: values(:)
        integer, intent(out), optional :: ierr
        call tell(c_params(c_string(name), values, size(values, kind=c_int64_t), double), ierr)
    end subroutine

    subroutine tell(code, ierr)
        integer(c_int), intent(in) :: code
        integer, intent(out), optional :: ierr
        if (present(ierr)) ierr = int(code)
    end subroutine

    pure function c_string(text)
        character(*), intent(in) :: text
        character(len_trim(text) + 1, c_char) :: c_string
        c_string = trim(text) // c_null_char
    end function

    pure function backwards(lengths)
        integer(c_int64_t), intent(in) :: lengths(:)
        integer(c_int64_t) :: backwards(size(lengths))
        backwards = lengths(size(lengths):1:-1)
    end function
end module
