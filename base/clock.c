#include "clock.h"

void clock_measure(double *cost_ns, double *resolution_ns)
{
        enum { CALLS = 10000 };
        uint64_t start = clock_ns(), last = start, step = UINT64_MAX;

        for (int i = 0; i < CALLS; i++) {
                uint64_t now = clock_ns();

                if (now != last && now - last < step)
                        step = now - last;
                last = now;
        }
        *cost_ns = (double)(last - start) / CALLS;
        *resolution_ns = (double)(step == UINT64_MAX ? 0 : step);
}

static void format_now(char *buf, const char *format)
{
        time_t now = time(NULL);
        struct tm utc;

        gmtime_r(&now, &utc);
        strftime(buf, 24, format, &utc);
}

void clock_iso8601(char *buf)
{
        format_now(buf, "%Y-%m-%dT%H:%M:%SZ");
}

void clock_compact(char *buf)
{
        format_now(buf, "%Y%m%dT%H%M%SZ");
}

uint64_t clock_cpu_ns(void)
{
        struct timespec ts;

        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &ts);
        return (uint64_t)ts.tv_sec * NS_PER_S + (uint64_t)ts.tv_nsec;
}

void clock_spin_until(uint64_t t_ns)
{
        while (clock_ns() < t_ns)
                cpu_relax();
}
