/* doctor: looking below the root, and noting down. */
#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "doctor_inside.h"
#include "err.h"
#include "files.h"

#define FILE_MAX   (1 << 20) /* /proc/cpuinfo of many cores is long */
#define STATE_MAX  1024
#define STATUS_YOU "you"

const char *const doctor_verdict_names[] = {
    [DOC_OK] = "ok", [DOC_LIMITED] = "limited", [DOC_OFF] = "off", [DOC_UNKNOWN] = "unknown"};

/* What is looked at goes to a terminal: a garbled file must not move its cursor. */
static void make_printable(char *text)
{
        for (unsigned char *p = (unsigned char *)text; *p; p++)
                if (*p < ' ' || *p > '~')
                        *p = '?';
}

/* ---- noting down ---- */

static void set_formatted(json *f, const char *key, const char *fmt, va_list args)
{
        char text[STATE_MAX];

        vsnprintf(text, sizeof(text), fmt, args);
        make_printable(text);
        json_set_str(f, key, text);
}

void doctor_find(struct doctor *d, enum doctor_verdict verdict, const char *what, const char *fmt, ...)
{
        va_list args;

        d->last = json_object();
        json_set_str(d->last, "section", d->section);
        json_set_str(d->last, "finding", what);
        json_set_str(d->last, "verdict", doctor_verdict_names[verdict]);
        va_start(args, fmt);
        set_formatted(d->last, "state", fmt, args);
        va_end(args);
        json_set_null(d->last, "why");
        json_set_null(d->last, "mend");
        json_set_null(d->last, "who");
        json_set(d->last, "facts", json_object());
        json_push(d->findings, d->last);
}

void doctor_why(struct doctor *d, const char *fmt, ...)
{
        va_list args;

        va_start(args, fmt);
        set_formatted(d->last, "why", fmt, args);
        va_end(args);
}

void doctor_mend(struct doctor *d, enum doctor_who who, const char *fmt, ...)
{
        bool you = who == BY_YOU || (who == BY_ADMIN && d->superuser);
        va_list args;

        va_start(args, fmt);
        set_formatted(d->last, "mend", fmt, args);
        va_end(args);
        json_set_str(d->last, "who", you ? STATUS_YOU : "administrator");
}

json *doctor_facts(struct doctor *d)
{
        return (json *)json_get(d->last, "facts");
}

/* ---- looking ---- */

#define FULL_PATH(d, out, fmt)                                                     \
        do {                                                                       \
                va_list args_;                                                     \
                int used_ = snprintf(out, sizeof(out), "%s", (d)->root);           \
                                                                                   \
                used_ = used_ < (int)sizeof(out) ? used_ : (int)sizeof(out) - 1;   \
                va_start(args_, fmt);                                              \
                vsnprintf((out) + used_, sizeof(out) - (size_t)used_, fmt, args_); \
                va_end(args_);                                                     \
        } while (0)

static char *read_whole(const char *path)
{
        char *text;
        size_t len;

        if (file_read(path, FILE_MAX, &text, &len) < 0) {
                err_clear();
                return NULL;
        }
        return text;
}

static void first_line(char out[DOC_TEXT], const char *text)
{
        snprintf(out, DOC_TEXT, "%.*s", (int)strcspn(text, "\n"), text);
        make_printable(out);
}

bool doctor_look(const struct doctor *d, char out[DOC_TEXT], const char *fmt, ...)
{
        char path[PATH_MAX], *text;

        FULL_PATH(d, path, fmt);
        out[0] = '\0';
        text = read_whole(path);
        if (!text)
                return false;
        first_line(out, text);
        free(text);
        return true;
}

long long doctor_number(const struct doctor *d, long long otherwise, const char *fmt, ...)
{
        char path[PATH_MAX], *text, *end;
        long long value;

        FULL_PATH(d, path, fmt);
        text = read_whole(path);
        if (!text)
                return otherwise;
        errno = 0;
        value = strtoll(text, &end, 0);
        if (end == text || errno)
                value = otherwise;
        free(text);
        return value;
}

char *doctor_text(const struct doctor *d, const char *path)
{
        char full[PATH_MAX];

        snprintf(full, sizeof(full), "%s%s", d->root, path);
        return read_whole(full);
}

bool doctor_line(const char *text, const char *label, char out[DOC_TEXT])
{
        size_t len = strlen(label);

        out[0] = '\0';
        while (text && *text) {
                if (strncmp(text, label, len) == 0) {
                        text += len + strspn(text + len, " \t:");
                        first_line(out, text);
                        return true;
                }
                text += strcspn(text, "\n");
                text += *text == '\n';
        }
        return false;
}

bool doctor_there(const struct doctor *d, const char *fmt, ...)
{
        char path[PATH_MAX];

        FULL_PATH(d, path, fmt);
        return access(path, F_OK) == 0;
}

int doctor_access(const struct doctor *d, const char *path, int mode)
{
        char full[PATH_MAX];

        snprintf(full, sizeof(full), "%s%s", d->root, path);
        return access(full, mode) == 0 ? 0 : errno;
}

bool doctor_link(const struct doctor *d, char out[DOC_TEXT], const char *fmt, ...)
{
        char path[PATH_MAX], target[PATH_MAX];
        ssize_t len;

        FULL_PATH(d, path, fmt);
        len = readlink(path, target, sizeof(target) - 1);
        out[0] = '\0';
        if (len < 0)
                return false;
        target[len] = '\0';
        snprintf(out, DOC_TEXT, "%.*s", DOC_TEXT - 1, strrchr(target, '/') ? strrchr(target, '/') + 1 : target);
        make_printable(out);
        return true;
}

void doctor_where(const struct doctor *d, char out[DOC_PATH], const char *fmt, ...)
{
        char path[PATH_MAX], *real;
        size_t skip = strlen(d->root);
        const char *at;

        FULL_PATH(d, path, fmt);
        real = realpath(path, NULL);
        at = real && strlen(real) >= skip ? strstr(real + skip, "/devices/")
                                          : NULL; /* a link may lead out of the root */
        snprintf(out, DOC_PATH, "%s", at ? at + strlen("/devices/") : "");
        free(real);
}

static int is_printable(const struct dirent *e)
{
        if (e->d_name[0] == '.')
                return 0;
        for (const unsigned char *p = (const unsigned char *)e->d_name; *p; p++)
                if (*p < ' ' || *p > '~')
                        return 0;
        return 1;
}

struct doctor_names doctor_list(const struct doctor *d, const char *fmt, ...)
{
        struct doctor_names names = {0};
        char path[PATH_MAX];

        FULL_PATH(d, path, fmt);
        names.n = scandir(path, &names.at, is_printable, versionsort);
        if (names.n < 0)
                names = (struct doctor_names){0};
        return names;
}

void doctor_list_free(struct doctor_names *names)
{
        for (int i = 0; i < names->n; i++)
                free(names->at[i]);
        free(names->at);
        *names = (struct doctor_names){0};
}

int doctor_count(const struct doctor *d, const char *folder)
{
        struct doctor_names names = doctor_list(d, "%s", folder);
        int n = names.n;

        doctor_list_free(&names);
        return n;
}

/* ---- small questions ---- */

long doctor_list_count(const char *list)
{
        long count = 0;

        while (*list >= '0' && *list <= '9') {
                char *end;
                long first = strtol(list, &end, 10), last = first;

                if (*end == '-')
                        last = strtol(end + 1, &end, 10);
                if (last < first || last > INT_MAX)
                        return 0;
                count += last - first + 1;
                list = *end == ',' ? end + 1 : end;
        }
        return count;
}

const char *doctor_size(char buf[32], unsigned long long bytes)
{
        static const char *const units[] = {"bytes", "KiB", "MiB", "GiB", "TiB"};
        double value = (double)bytes;
        unsigned unit = 0;

        while (value >= 1024 && unit < 4) {
                value /= 1024;
                unit++;
        }
        snprintf(buf, 32, value == (double)(long long)value ? "%.0f %s" : "%.1f %s", value, units[unit]);
        return buf;
}

bool doctor_kernel_at_least(const struct doctor *d, int major, int minor)
{
        char text[DOC_TEXT];
        int a, b;

        doctor_look(d, text, "/proc/sys/kernel/osrelease");
        return sscanf(text, "%d.%d", &a, &b) == 2 && (a > major || (a == major && b >= minor));
}
