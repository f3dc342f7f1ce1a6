/* What the library is checked with: the version of its interface, and the threads that a region really gets. */

/* Equals ABI in signatures.py; both change when a function's arguments change. */
int moestro_abi(void) { return 1; }

/* How many threads ran a parallel region that asked for `threads`. */
int moestro_threads(int threads) {
    int ran = 0;
#pragma omp parallel num_threads(threads)
    {
#pragma omp atomic
        ran++;
    }
    return ran;
}
