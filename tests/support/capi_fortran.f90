! Calls of the Fortran module with both kinds of reals and both ranks of y, in a subroutine of a program in C.
subroutine in_fortran(comm, spec, length) bind(C)
    use, intrinsic :: iso_c_binding
    use agnmpi
    implicit none
    integer(c_int), intent(in) :: comm
    integer(c_int), value :: length
    character(kind=c_char), intent(in) :: spec(length)
    character(length) :: name
    integer :: i, ierr, taken, total
    integer(c_int64_t) :: own, all
    real(c_double) :: x(2, 5), y(5), more(4, 5), loss
    real(c_float) :: small_x(2, 5), small_y(5), w(1), columns(3, 5)

    do i = 1, length
        name(i:i) = spec(i)
    end do
    x = reshape([(real(i, c_double), i = 1, 10)], [2, 5])
    small_x = real(x, c_float)
    y = 3
    total = 0
    call agn_open(name // ":Places", comm, 2, "steps = 100, batch = 1, optimizer = 'sgd', rate = 0.5")
    do while (.not. agn_done())
        call agn_put(x, y)
        call agn_learn(1d9, taken)
        total = total + taken
    end do
    call agn_step(own, all, loss)
    call agn_close("fortran.safetensors   ")
    call agn_step(all=all)
    if (own /= total .or. all /= 100) error stop "each of 100 steps is taken once"
    call agn_params("w", w)
    if (w(1) <= 0) error stop "w has moved to y"
    call agn_predict(x, y)
    if (any(y /= x(1, :) + 10 * x(2, :))) error stop "a column is a sample"
    call agn_predict(small_x, small_y)
    if (any(small_y /= small_x(1, :) + 10 * small_x(2, :))) error stop "of either kind"
    call agn_errors_return(.true.)
    call agn_put(x, y(:4), ierr)
    if (ierr /= 1 .or. index(agn_error(), "after close") == 0) error stop "an error returns"
    call agn_errors_return(.false.)

    call agn_open(name // ":Pairs", comm, 2)
    call agn_predict(x, more(::2, :))
    if (any(more(1, :) /= x(1, :)) .or. any(more(3, :) /= 10 * x(2, :))) error stop "y with two numbers a sample"
    call agn_predict(small_x, columns(2:, :))
    if (any(columns(2, :) /= small_x(1, :)) .or. any(columns(3, :) /= 10 * small_x(2, :))) error stop "of either kind"
    call agn_put(small_x, columns)
    call agn_put(small_x, columns)
    call agn_stop()
    call agn_save("fortran.safetensors")
    call agn_close()
end subroutine
