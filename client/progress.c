#include <stdarg.h>

#include "clock.h"
#include "progress.h"

#define SHOW_EVERY_NS (100 * NS_PER_MS)

void progress_start(struct progress *p, size_t total)
{
        p->done = 0;
        p->total = total;
        p->start_ns = clock_ns();
        p->shown_ns = 0;
}

void progress_say(struct progress *p, const char *fmt, ...)
{
        va_list ap;

        if (!p->to)
                return;
        va_start(ap, fmt);
        fputs(p->line ? "\r\033[K" : "", p->to);
        vfprintf(p->to, fmt, ap);
        fputs(p->line ? "" : "\n", p->to);
        fflush(p->to);
        va_end(ap);
}

void progress_step(struct progress *p, const char *what)
{
        uint64_t now = clock_ns();
        double left;

        p->done++;
        if (!p->to || !p->line || now - p->shown_ns < SHOW_EVERY_NS)
                return;
        p->shown_ns = now;
        left = (double)(now - p->start_ns) / (double)p->done * (double)(p->total - p->done) / (double)NS_PER_S;
        progress_say(p, "%s: %zu of %zu measurements, %.0f s left", what, p->done, p->total, left);
}

void progress_end(struct progress *p)
{
        if (p->to && p->line)
                fputs("\r\033[K", p->to);
}
