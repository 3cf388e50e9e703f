#include "clock.h"

#include <stdio.h>
#include <string.h>

#define STAMP_WINDOW_NS (5 * NS_PER_MS)

double clock_stamp_scale;
int clock_stamp_tsc;

/* The kernel watches the counter against other clocks and drops it as its own source when it is not constant. */
static int kernel_trusts_tsc(void)
{
        char source[16] = "";
        FILE *f = fopen("/sys/devices/system/clocksource/clocksource0/current_clocksource", "re");

        if (f && !fgets(source, sizeof(source), f))
                source[0] = '\0';
        if (f)
                fclose(f);
        return !strcmp(source, "tsc\n");
}

/* Both clocks as of one moment: of several tries the one that took least. */
static uint64_t moment(uint64_t *stamp)
{
        uint64_t best = UINT64_MAX, at = 0;

        for (int i = 0; i < 32; i++) {
                uint64_t a = clock_stamp(), ns = clock_ns(), b = clock_stamp();

                if (b - a < best) {
                        best = b - a;
                        *stamp = a + (b - a) / 2;
                        at = ns;
                }
        }
        return at;
}

void clock_stamp_init(void)
{
        uint64_t s0, s1, t0, t1;

        if (clock_stamp_scale > 0)
                return;
#if defined(__x86_64__)
        clock_stamp_tsc = kernel_trusts_tsc();
#endif
        if (!clock_stamp_tsc) {
                clock_stamp_scale = 1;
                return;
        }
        t0 = moment(&s0);
        clock_spin_until(t0 + STAMP_WINDOW_NS);
        t1 = moment(&s1);
        clock_stamp_scale = (double)(t1 - t0) / (double)(s1 - s0);
}

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
