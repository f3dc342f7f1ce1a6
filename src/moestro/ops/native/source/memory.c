/* Asking the system for large pages before a large result is first written: touching 50 MB of fresh memory page by page
 * costs several times what filling it costs. Where there are none nothing happens. */
#include <stdint.h>
#include <sys/mman.h>

void moestro_large_pages(void *start, int64_t bytes)
{
#ifdef MADV_HUGEPAGE
    const uintptr_t page = (uintptr_t)1 << 21;
    uintptr_t from = ((uintptr_t)start + page - 1) & ~(page - 1), to = ((uintptr_t)start + (uintptr_t)bytes) & ~(page - 1);
    if (to > from)
        madvise((void *)from, to - from, MADV_HUGEPAGE);
#else
    (void)start;
    (void)bytes;
#endif
}
