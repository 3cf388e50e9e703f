#include "log.h"

#include <errno.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define LINE_BYTES  2048
#define LEVEL_UNSET (-1)

static const char *const level_env[] = {"error", "warn", "info", "debug"};
static const char *const level_tag[] = {"error: ", "warning: ", "", "debug: "};

static _Atomic int threshold = LEVEL_UNSET;

static int level_from_env(void)
{
        const char *want = getenv("DJINN_LOG");

        for (int i = 0; want && i <= LOG_DEBUG; i++)
                if (strcmp(want, level_env[i]) == 0)
                        return i;
        return LOG_INFO;
}

void log_set_level(enum log_level level)
{
        atomic_store_explicit(&threshold, (int)level, memory_order_relaxed);
}

static bool wanted(enum log_level level)
{
        int now = atomic_load_explicit(&threshold, memory_order_relaxed);

        if (now == LEVEL_UNSET) {
                now = level_from_env();
                log_set_level((enum log_level)now);
        }
        return (int)level <= now;
}

/* Text may quote a peer or a file: control characters must not reach the terminal. */
static void make_printable(char *s)
{
        for (; *s; s++)
                if (((unsigned char)*s < 0x20 && *s != '\n' && *s != '\t') || *s == 0x7f)
                        *s = '?';
}

void log_line(enum log_level level, const char *fmt, ...)
{
        char line[LINE_BYTES];
        int saved = errno;
        va_list ap;

        if (!wanted(level))
                return;
        size_t head = (size_t)snprintf(line, sizeof(line), "djinnbench: %s", level_tag[level]);

        va_start(ap, fmt);
        vsnprintf(line + head, sizeof(line) - head - 1, fmt, ap);
        va_end(ap);
        make_printable(line);
        size_t len = strlen(line);

        line[len++] = '\n';
        ssize_t wrote = write(STDERR_FILENO, line, len);

        (void)wrote; /* nowhere to report to */
        errno = saved;
}
