# Fast matrix products for MLX on a Linux CPU. To be sourced:  . examples/fast_blas.sh
#
# MLX's wheel for Linux links a slow reference BLAS; an OpenBLAS that is preloaded replaces it. This
# finds libopenblas.so.0, or installs Debian's libopenblas0-pthread if that needs no password, and
# exports LD_PRELOAD and OPENBLAS_CORETYPE unless the caller has set them, and GLIBC_TUNABLES, so that
# memory comes in huge pages. It never fails: without OpenBLAS everything runs, only slower. On macOS
# it does nothing.
# shellcheck shell=sh

_fast_blas_find() {
    # ldconfig is often not in a user's PATH. `sed` reads all of its output, to avoid a broken pipe.
    _path=$(PATH="$PATH:/usr/sbin:/sbin" ldconfig -p 2>/dev/null |
        sed -n 's/.*libopenblas\.so\.0 .*=> //p' | sed -n 1p) || return 1
    # ld.so prints an error if it cannot preload a library, such as one for another CPU.
    [ -n "$_path" ] && [ -z "$(LD_PRELOAD=$_path env true 2>&1)" ] && echo "$_path"
}

_fast_blas_install() {
    command -v apt-get >/dev/null || return 1
    _sudo=
    if [ "$(id -u)" != 0 ]; then
        sudo -n true 2>/dev/null || return 1
        _sudo="sudo -n"
    fi
    echo "fast_blas: installing libopenblas0-pthread" >&2
    for _step in "update" "install -y --no-install-recommends libopenblas0-pthread"; do
        # shellcheck disable=SC2086  # split into words on purpose
        $_sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Acquire::http::Timeout=20 \
            $_step >/dev/null 2>&1 </dev/null || [ "$_step" = update ] || return 1
    done
}

_fast_blas() {
    [ "$(uname -s)" = Linux ] || return 0
    # With 4 KB pages a decoding step can take longer to find the weights' pages than to multiply, above
    # all in a virtual machine. The thresholds keep large blocks in the heap, and the heap large.
    export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=1073741824}"
    case "${LD_PRELOAD:-}" in *blas* | *mkl*) return 0 ;; esac
    if ! _library=$(_fast_blas_find); then
        if ! _fast_blas_install || ! _library=$(_fast_blas_find); then
            echo "fast_blas: no libopenblas.so.0 (Debian: libopenblas0-pthread); matrix products will be slow" >&2
            return 0
        fi
    fi
    export LD_PRELOAD="$_library${LD_PRELOAD:+:$LD_PRELOAD}"
    [ -z "${OPENBLAS_CORETYPE:-}" ] || return 0
    # An OpenBLAS older than the CPU falls back to slow kernels, so name the best ones it surely has.
    # The SkylakeX kernels need more of AVX-512 than avx512f; a CPU with avx512vl has all of it.
    if grep -qw avx512vl /proc/cpuinfo 2>/dev/null; then
        export OPENBLAS_CORETYPE=SkylakeX
    elif grep -qw avx2 /proc/cpuinfo 2>/dev/null; then
        export OPENBLAS_CORETYPE=Haswell
    fi
}

_fast_blas
unset -f _fast_blas _fast_blas_find _fast_blas_install
unset -v _path _sudo _step _library
