! The heat equation on a plate, and a surrogate of it that is trained while it runs: heat.py, in Fortran.
!
!     mpiexec -n 3 ./heat_f [GRID [TIME_STEPS [TRAIN [FILE]]]]
!
! TRAIN: training steps over all ranks; 0: the solver alone. FILE: for draw.py. Started where surrogate.py is found.
! The lines with agn_ are all that the training changes.
program heat
    use, intrinsic :: iso_fortran_env, only: int64, real64
    use mpi_f08
    use agnmpi
    implicit none
    type(MPI_Comm) :: comm                       ! the solver's own
    integer :: rank, ranks, up, down             ! this rank, and those that hold the rows before and after its own
    integer :: n, time_steps, train, first, rows, k, i
    integer(int64) :: steps
    real(real64) :: h, dt, t, finish, sums(4), mean
    real(real64), allocatable :: field(:, :)     ! (0:n+1, 0:rows+1): this rank's rows, with a halo at each side
    real(real64), allocatable :: x(:, :), y(:), predicted(:), truth(:), surrogate(:)
    real(real64), allocatable :: seen_x(:, :), seen_y(:), seen(:)  ! for the error: at five times
    character(80) :: options
    character(4096) :: file                      ! the longest path

    n = argument(1, 48)
    time_steps = argument(2, 600)
    train = argument(3, 9000)
    call get_command_argument(4, file)
    call MPI_Init()
    call MPI_Comm_size(MPI_COMM_WORLD, ranks)
    call MPI_Cart_create(MPI_COMM_WORLD, 1, [ranks], [.false.], .false., comm)
    call MPI_Comm_rank(comm, rank)
    call MPI_Cart_shift(comm, 0, 1, up, down)
    call make_plate()
    finish = time_steps * dt
    allocate(x(3, n * rows), y(n * rows), predicted(n * rows), truth(n * n), surrogate(n * n))
    allocate(seen_x(3, 5 * n * rows), seen_y(5 * n * rows), seen(5 * n * rows))

    write(options, '(a, i0, a)') "steps = ", train, ", rate = 0.003, capacity = 20000"
    if (train > 0) call agn_open("surrogate.py:Heat", MPI_COMM_WORLD%mpi_val, 10, options)
    do k = 1, time_steps
        call step()
        call samples()
        if (train > 0) then
            call agn_put(x, y)
            call agn_learn(0.02d0)  ! at most 2 % of the solver's time
        end if
        i = k / (time_steps / 5)
        if (mod(k, time_steps / 5) == 0 .and. i <= 5) then
            seen_x(:, (i - 1) * size(y) + 1:i * size(y)) = x
            seen_y((i - 1) * size(y) + 1:i * size(y)) = y
        end if
    end do
    call gather(y, truth)
    if (rank == 0) print '(a, z16.16, a, i0, a)', "plate ", bits(truth), ", ", time_steps, " steps"

    if (train > 0) then
        call agn_step(own=steps)
        print '(a, i0, a, i0, a)', "rank ", rank, " took ", steps, " steps while the plate was computed"
        do while (.not. agn_done())  ! the plate is ready: what is left of the steps
            call agn_learn(1.0d0)
        end do
        call agn_close("heat_f.safetensors")
        call agn_predict(seen_x, seen)
        sums = [real(size(seen), real64), sum(seen_y), sum(seen_y**2), sum((seen - seen_y)**2)]
        call MPI_Allreduce(MPI_IN_PLACE, sums, 4, MPI_DOUBLE_PRECISION, MPI_SUM, comm)
        call agn_predict(x, predicted)
        call gather(predicted, surrogate)
        call agn_step(all=steps)
        if (rank == 0) then
            do i = n / 8, n - 1, n / 4
                print '(2(a, f4.2), 2(a, f6.3))', "at (", (i + 1) * h, ", ", (i + 1) * h, "): truth ", &
                    truth(i * n + i + 1), ", surrogate ", surrogate(i * n + i + 1)
            end do
            mean = sums(2) / sums(1)
            print '(a, f5.3, a, i0, a)', "error of the surrogate: ", &
                sqrt(sums(4) / sums(1) / (sums(3) / sums(1) - mean**2)), " of the mean's, after ", steps, " steps"
            if (file /= "") call write_file()
        end if
    end if
    call MPI_Finalize()

contains

    integer function argument(number, default)
        integer, intent(in) :: number, default
        character(20) :: text
        call get_command_argument(number, text)
        argument = default
        if (text /= "") read(text, *) argument
    end function

    subroutine make_plate()
        integer :: row, column
        real(real64) :: px, py
        h = 1d0 / (n + 1)
        dt = h**2 / 5
        t = 0
        first = rank * n / ranks
        rows = (rank + 1) * n / ranks - first
        allocate(field(0:n + 1, 0:rows + 1))
        field = 0
        do row = 1, rows
            do column = 1, n
                px = column * h
                py = (first + row) * h
                field(column, row) = 5 * exp(-((px - 0.3d0)**2 + (py - 0.3d0)**2) / 0.03d0) &
                    + 5 * exp(-((px - 0.6d0)**2 + (py - 0.75d0)**2) / 0.03d0)
            end do
        end do
    end subroutine

    ! dT/dt = ∇²T on the unit square, T = 0 on its edge: an explicit step.
    subroutine step()
        call MPI_Sendrecv(field(:, 1), n + 2, MPI_DOUBLE_PRECISION, up, 0, &
            field(:, rows + 1), n + 2, MPI_DOUBLE_PRECISION, down, 0, comm, MPI_STATUS_IGNORE)
        call MPI_Sendrecv(field(:, rows), n + 2, MPI_DOUBLE_PRECISION, down, 1, &
            field(:, 0), n + 2, MPI_DOUBLE_PRECISION, up, 1, comm, MPI_STATUS_IGNORE)
        field(1:n, 1:rows) = field(1:n, 1:rows) + dt / h**2 * (field(1:n, 0:rows - 1) + field(1:n, 2:rows + 1) &
            + field(0:n - 1, 1:rows) + field(2:n + 1, 1:rows) - 4 * field(1:n, 1:rows))
        t = t + dt
    end subroutine

    ! All places of this rank at the time now, as x(3, m) = (x, y, t/finish), and the temperatures there, y(m).
    subroutine samples()
        integer :: row, column, m
        do row = 1, rows
            do column = 1, n
                m = (row - 1) * n + column
                x(:, m) = [column * h, (first + row) * h, t / finish]
                y(m) = field(column, row)
            end do
        end do
    end subroutine

    ! The values of all ranks, at rank 0.
    subroutine gather(values, whole)
        real(real64), intent(in) :: values(:)
        real(real64), intent(inout) :: whole(:)
        integer :: begins(0:ranks), r
        begins = [(r * n / ranks * n, r = 0, ranks)]
        call MPI_Gatherv(values, size(values), MPI_DOUBLE_PRECISION, whole, begins(1:) - begins(:ranks - 1), begins, &
            MPI_DOUBLE_PRECISION, 0, comm)
    end subroutine

    ! A hash of all bits.
    integer(int64) function bits(values)
        real(real64), intent(in) :: values(:)
        integer :: j
        bits = 0
        do j = 1, size(values)
            bits = ieor(ishftc(bits, 7), transfer(values(j), bits))
        end do
    end function

    subroutine write_file()
        integer :: unit
        open(newunit=unit, file=file, access="stream", form="unformatted", status="replace")
        write(unit) truth, surrogate
        close(unit)
    end subroutine
end program
