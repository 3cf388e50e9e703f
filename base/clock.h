/*
 * The program's only clock: CLOCK_MONOTONIC in nanoseconds (vDSO, no system call, common to all processes of one
 * host, so that stamps of a client and a server on one host need no correction). Wall-clock time is for file names.
 */
#ifndef DJINN_BASE_CLOCK_H
#define DJINN_BASE_CLOCK_H

#include <stdint.h>
#include <time.h>

static inline uint64_t clock_ns(void)
{
        struct timespec ts;

        clock_gettime(CLOCK_MONOTONIC, &ts);
        return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

#define NS_PER_US 1000ull
#define NS_PER_MS 1000000ull
#define NS_PER_S  1000000000ull

/*
 * For loops that time themselves every round: what the clock counts by itself, without waiting for the instructions
 * before it, as clock_ns() does. That wait is no small thing: it keeps a reply from being prepared while the request is
 * still arriving, and so lengthens what it measures. Only differences mean anything, and only on one thread; a stamp may
 * be early or late by the instructions in flight, some tens of ns. Where the kernel does not trust the processor's
 * counter, neither do we: a stamp is clock_ns() then.
 */
extern double clock_stamp_scale; /* ns in one unit of a stamp; 0 until clock_stamp_init */
extern int clock_stamp_tsc;

/* Before the first stamp; measures the counter against clock_ns(), about 10 ms the first time. Any thread, before others
 * use it. */
void clock_stamp_init(void);

static inline uint64_t clock_stamp(void)
{
#if defined(__x86_64__)
        if (__builtin_expect(clock_stamp_tsc, 1))
                return __builtin_ia32_rdtsc();
#endif
        return clock_ns();
}

static inline uint64_t clock_stamp_ns(uint64_t from, uint64_t to)
{
        return to > from ? (uint64_t)((double)(to - from) * clock_stamp_scale) : 0;
}

/* Cost of one clock_ns() call and the smallest step seen, both in ns, measured now (about 1 ms). */
void clock_measure(double *cost_ns, double *resolution_ns);

/* "2026-11-22T12:00:00Z" and "20261122T120000Z", UTC, of now; buf holds at least 24 bytes. */
void clock_iso8601(char *buf);
void clock_compact(char *buf);

/* CPU time of this process so far, user + system, in ns. */
uint64_t clock_cpu_ns(void);

static inline void cpu_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        __asm__ volatile("yield");
#endif
}

/* Spins until clock_ns() >= t_ns. For calibration and injury only. */
void clock_spin_until(uint64_t t_ns);

#endif
