/* Bytes per second of reading memory once, in order, one part per thread: what weights streamed by decoding can reach.
   stream_read THREADS SECONDS -> the median and the best pass over 768 MB, in bytes per second. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define BYTES ((size_t)768 << 20)
#define HUGE_PAGE ((size_t)2 << 20)
#define MAX_PASSES 1000

static uint64_t *buffer;
static int threads;
static volatile uint64_t sink;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void *read_part(void *argument) {
    size_t part = BYTES / threads / 8, i = (size_t)argument * part, end = i + part;
    uint64_t sums[64] = {0};
    for (; i + 64 <= end; i += 64) {
        __builtin_prefetch(buffer + i + 1024);
        for (int j = 0; j < 64; j++) sums[j] += buffer[i + j];
    }
    uint64_t total = 0;
    for (int j = 0; j < 64; j++) total += sums[j];
    sink = total;
    return NULL;
}

static int ascending(const void *a, const void *b) {
    return (*(double *)a > *(double *)b) - (*(double *)a < *(double *)b);
}

int main(int count, char **arguments) {
    if (count < 3) return 2;
    threads = atoi(arguments[1]);
    char *raw = mmap(NULL, BYTES + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (raw == MAP_FAILED) return 1;
    buffer = (uint64_t *)(((uintptr_t)raw + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1));
    madvise(buffer, BYTES, MADV_HUGEPAGE);
    memset(buffer, 1, BYTES);
    double speeds[MAX_PASSES], begin = now();
    int passes = 0;
    while (passes < MAX_PASSES && (passes < 5 || now() - begin < atof(arguments[2]))) {
        pthread_t others[256];
        double start = now();
        for (long i = 1; i < threads; i++) pthread_create(&others[i], NULL, read_part, (void *)i);
        read_part((void *)0);
        for (int i = 1; i < threads; i++) pthread_join(others[i], NULL);
        speeds[passes++] = BYTES / (now() - start);
    }
    qsort(speeds, passes, sizeof(double), ascending);
    printf("{\"median\": %.0f, \"best\": %.0f}\n", speeds[passes / 2], speeds[passes - 1]);
    return 0;
}
