/* djinnbench report: finds result files, reads what can be read, and prints one table of all of them. */
#include "report.h"

#include <dirent.h>
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "check.h"
#include "err.h"
#include "files.h"
#include "report_inside.h"
#include "tools.h"

#define RESULT_MAX_BYTES ((size_t)512 << 20)
#define FOLDER_DEPTH_MAX 4  /* results/MACHINE/WORKLOAD/FILE, and one to spare */
#define STAMP_LEN        16 /* YYYYmmddTHHMMSSZ */

/* ---- the library ---- */

int report_load(const char *path, struct report_source *out)
{
        char *text = NULL;
        size_t len = 0;

        *out = (struct report_source){0};
        int rc = file_read(path, RESULT_MAX_BYTES, &text, &len);

        if (rc < 0)
                return rc;
        struct digest raw = digest_of(text, len);
        json *doc = json_parse(text, len, path);

        free(text);
        rc = doc ? report_check(doc, path) : -EINVAL;
        char *name = rc == 0 ? strdup(path) : NULL;

        if (rc == 0 && !name)
                rc = err_set(-ENOMEM, "%s: no memory", path);
        if (rc < 0) {
                json_free(doc);
                return rc;
        }
        *out = (struct report_source){.doc = doc, .name = name, .hashed = true, .raw = raw};
        return 0;
}

void report_free(struct report_source *source)
{
        json_free((json *)(uintptr_t)source->doc);
        free((char *)(uintptr_t)source->name);
        *source = (struct report_source){0};
}

int report_write(FILE *out, const struct report_source *sources, size_t n, enum report_table table,
                 enum report_format format)
{
        static int (*const formats[])(FILE *, const struct report_view *) = {
            [REPORT_MARKDOWN] = report_markdown, [REPORT_CSV] = report_csv, [REPORT_JSON] = report_json};
        struct report_view view;
        int rc = report_view_make(sources, n, table, &view);

        errno = 0;
        if (rc == 0)
                rc = formats[format](out, &view);
        report_view_free(&view);
        if (rc == 0 && (fflush(out) != 0 || ferror(out)))
                rc =
                    err_set(errno ? -errno : -EIO, "report: cannot write the table: %s", strerror(errno ? errno : EIO));
        return rc;
}

int report_print(FILE *out, const json *const *docs, size_t n, enum report_table table, enum report_format format)
{
        struct report_source *sources = calloc(n ? n : 1, sizeof(*sources));
        int rc = sources ? 0 : err_set(-ENOMEM, "report: no memory for %zu results", n);

        for (size_t i = 0; i < n && rc == 0; i++) {
                sources[i].doc = docs[i];
                rc = report_check(docs[i], NULL);
        }
        if (rc == 0)
                rc = report_write(out, sources, n, table, format);
        free(sources);
        return rc;
}

/* ---- finding files ---- */

struct paths {
        char **at;
        size_t count, room;
};

static int paths_add(struct paths *p, const char *path)
{
        if (p->count == p->room) {
                size_t room = p->room ? 2 * p->room : 64;
                char **at = realloc(p->at, room * sizeof(*at));

                if (!at)
                        return err_set(-ENOMEM, "report: no memory for %zu paths", room);
                p->at = at;
                p->room = room;
        }
        p->at[p->count] = strdup(path);
        return p->at[p->count] ? (int)(p->count++, 0) : err_set(-ENOMEM, "report: no memory for a path");
}

static void paths_free(struct paths *p)
{
        for (size_t i = 0; i < p->count; i++)
                free(p->at[i]);
        free(p->at);
}

/* The stamp in "<tag>_<YYYYmmddTHHMMSSZ>.json", or NULL: then it is no result's name. */
static const char *stamp_of(const char *path)
{
        static const char shape[] = "_00000000T000000Z.json";
        size_t len = strlen(path), n = sizeof(shape) - 1;

        if (len <= n)
                return NULL;
        const char *tail = path + len - n;

        for (size_t i = 0; i < n; i++) {
                bool fits = shape[i] == '0' ? tail[i] >= '0' && tail[i] <= '9' : tail[i] == shape[i];

                if (!fits)
                        return NULL;
        }
        return tail + 1;
}

static int find(struct paths *found, const char *path, unsigned depth);

/* What is named like a result, and folders. Other files are none of ours: the schema, perf's results, notes. */
static int find_entry(struct paths *found, const char *folder, const char *name, unsigned depth)
{
        char path[4096];
        struct stat st;
        int n = snprintf(path, sizeof(path), "%s/%s", folder, name);

        if (name[0] == '.' || n < 0 || (size_t)n >= sizeof(path) || stat(path, &st) < 0)
                return 0;
        if (S_ISDIR(st.st_mode))
                return depth ? find(found, path, depth - 1) : 0;
        return S_ISREG(st.st_mode) && stamp_of(path) ? paths_add(found, path) : 0;
}

static int find(struct paths *found, const char *path, unsigned depth)
{
        DIR *dir = opendir(path);
        int rc = 0;

        if (!dir)
                return err_set(-errno, "%s: cannot read the folder: %s", path, strerror(errno));
        for (struct dirent *e = readdir(dir); e && rc == 0; e = readdir(dir))
                rc = find_entry(found, path, e->d_name, depth);
        closedir(dir);
        return rc;
}

/* By the stamps, so that runs stand one after the other, each with its workloads in the order in which they ran. */
static int by_time(const void *a, const void *b)
{
        const char *left = *(char *const *)a, *right = *(char *const *)b;
        int order = strncmp(stamp_of(left), stamp_of(right), STAMP_LEN);

        return order ? order : strcmp(left, right);
}

/* A folder of results, or one result whatever its name. */
static int find_all(struct paths *found, const char *where)
{
        struct stat st;

        if (stat(where, &st) < 0)
                return err_set(-errno, "%s: %s; expected a folder of results, as sweep --output-dir makes it", where,
                               strerror(errno));
        if (!S_ISDIR(st.st_mode))
                return paths_add(found, where);
        int rc = find(found, where, FOLDER_DEPTH_MAX);

        if (rc == 0 && found->count)
                qsort(found->at, found->count, sizeof(*found->at), by_time);
        return rc;
}

/* ---- the command ---- */

struct report_options {
        const char *results_dir, *output;
        int format, table;
        bool latest_only;
        struct opt_list workloads;
};

static const char *const format_words[] = {"markdown", "csv", "json", NULL};
static const char *const table_words[] = {"1", "sample", "full", NULL};
static const enum report_table table_of[] = {REPORT_TABLE_1, REPORT_TABLE_SAMPLE, REPORT_TABLE_FULL};
static const enum report_format format_of[] = {REPORT_MARKDOWN, REPORT_CSV, REPORT_JSON};

static const struct opt report_options[] = {
    {.name = "results-dir",
     .also = "input-dir",
     .metavar = "DIR",
     .type = OPT_STR,
     .offset = offsetof(struct report_options, results_dir),
     .preset = "djinnbench-results",
     .help = "folder with WORKLOAD/TAG_STAMP.json files, or one such file"},
    {.name = "format",
     .also = "output-format",
     .type = OPT_CHOICE,
     .offset = offsetof(struct report_options, format),
     .choices = format_words,
     .preset = "markdown",
     .help = "how to print"},
    {.name = "table",
     .type = OPT_CHOICE,
     .offset = offsetof(struct report_options, table),
     .choices = table_words,
     .preset = "1",
     .help = "1: overhead and where it goes; sample: the experiment's; full: every column"},
    {.name = "latest-only",
     .type = OPT_FLAG,
     .offset = offsetof(struct report_options, latest_only),
     .help = "only the newest result of each workload, by the stamp in its name"},
    {.name = "workloads",
     .metavar = "W",
     .type = OPT_LIST,
     .offset = offsetof(struct report_options, workloads),
     .help = "only these workloads"},
    {.name = "output",
     .metavar = "FILE",
     .type = OPT_STR,
     .offset = offsetof(struct report_options, output),
     .help = "write there instead of to standard output"},
};

extern const struct opts_spec report_spec;
const struct opts_spec report_spec = {
    .name = "djinnbench report",
    .usage = "[options]",
    .about = "Prints a table of stored results; measures nothing. A missing value is printed as \"–\" (in CSV it is "
             "empty), never as 0.\n\n"
             "Exit status 1: a row is INVALID, or a file could not be used, which is said on standard error while the "
             "others are reported. 2: there was nothing to report.",
    .table = report_options,
    .count = ARRAY_LEN(report_options),
};

struct collection {
        struct report_source *sources;
        size_t count;
        size_t refused; /* files that could not be used */
};

static const char *workload_name(const struct report_source *s)
{
        return json_str(report_at(s->doc, "workload.workload"), "");
}

static bool wanted(const struct opt_list *names, const char *workload)
{
        for (size_t i = 0; i < names->count; i++)
                if (strcmp(names->at[i], workload) == 0)
                        return true;
        return names->count == 0;
}

static int load_all(const struct paths *paths, const struct opt_list *workloads, struct collection *c)
{
        c->sources = calloc(paths->count ? paths->count : 1, sizeof(*c->sources));
        if (!c->sources)
                return err_set(-ENOMEM, "report: no memory for %zu results", paths->count);
        for (size_t i = 0; i < paths->count; i++) {
                struct report_source *s = &c->sources[c->count];
                int rc = report_load(paths->at[i], s);

                if (rc < 0) {
                        command_fail(&report_spec, rc, EXIT_INVALID);
                        c->refused++;
                } else if (wanted(workloads, workload_name(s))) {
                        c->count++;
                } else {
                        report_free(s);
                }
        }
        return 0;
}

/* A file without a stamp is older than any. */
static const char *age_of(const struct report_source *s)
{
        const char *stamp = stamp_of(s->name);

        return stamp ? stamp : "";
}

static bool is_outdated(const struct collection *c, size_t i)
{
        for (size_t j = 0; j < c->count; j++) {
                if (j == i || strcmp(workload_name(&c->sources[i]), workload_name(&c->sources[j])) != 0)
                        continue;
                int order = strncmp(age_of(&c->sources[j]), age_of(&c->sources[i]), STAMP_LEN);

                if (order > 0 || (order == 0 && j > i))
                        return true;
        }
        return false;
}

static void keep_latest(struct collection *c)
{
        size_t kept = 0;
        bool *outdated = calloc(c->count ? c->count : 1, sizeof(*outdated));

        for (size_t i = 0; outdated && i < c->count; i++)
                outdated[i] = is_outdated(c, i);
        for (size_t i = 0; outdated && i < c->count; i++) {
                if (outdated[i])
                        report_free(&c->sources[i]);
                else
                        c->sources[kept++] = c->sources[i];
        }
        c->count = outdated ? kept : c->count;
        free(outdated);
}

/* How many of the workloads asked for have no result; each is named. */
static size_t missing_workloads(const struct opt_list *workloads, const struct collection *c)
{
        size_t missing = 0;

        for (size_t w = 0; w < workloads->count; w++) {
                size_t i = 0;

                while (i < c->count && strcmp(workload_name(&c->sources[i]), workloads->at[w]) != 0)
                        i++;
                if (i < c->count)
                        continue;
                fprintf(stderr, "djinnbench report: there is no usable result of workload '%.64s'\n", workloads->at[w]);
                missing++;
        }
        return missing;
}

static bool has_invalid_row(const struct collection *c)
{
        for (size_t i = 0; i < c->count; i++)
                for (const json *r = json_first(report_at(c->sources[i].doc, "workload.results")); r; r = json_next(r))
                        if (strcmp(json_str(report_at(r, "validity.verdict"), ""), "INVALID") == 0)
                                return true;
        return false;
}

/* The file is opened only now that there is something to put into it. */
static int print_to(const struct report_options *o, const struct collection *c)
{
        FILE *out = o->output ? fopen(o->output, "w") : stdout;

        if (!out)
                return err_set(-errno, "%s: cannot write: %s", o->output, strerror(errno));
        int rc = report_write(out, c->sources, c->count, table_of[o->table], format_of[o->format]);

        if (out != stdout && fclose(out) != 0 && rc == 0)
                rc = err_set(-errno, "%s: cannot write: %s", o->output, strerror(errno));
        return rc;
}

static int nothing(const struct report_options *o, const struct collection *c)
{
        fprintf(stderr, "djinnbench report: nothing to report in %s: %s\n", o->results_dir,
                c->refused ? "no file could be used" : "expected files named WORKLOAD/TAG_YYYYmmddTHHMMSSZ.json");
        return EXIT_USAGE;
}

static int run(const struct report_options *o, struct paths *paths, struct collection *c)
{
        int rc = find_all(paths, o->results_dir);

        if (rc == 0)
                rc = load_all(paths, &o->workloads, c);
        if (rc < 0)
                return command_fail(&report_spec, rc, EXIT_USAGE);
        size_t missing = missing_workloads(&o->workloads, c);

        if (o->latest_only)
                keep_latest(c);
        if (c->count == 0)
                return nothing(o, c);
        rc = print_to(o, c);
        if (rc < 0)
                return command_fail(&report_spec, rc, EXIT_ENVIRONMENT);
        return c->refused || missing || has_invalid_row(c) ? EXIT_INVALID : EXIT_DONE;
}

int report_main(int argc, char **argv)
{
        struct report_options o = {0};
        struct opts_parsed parsed;
        struct paths paths = {0};
        struct collection c = {0};
        int status = command_parse(&report_spec, argc, argv, &o, &parsed);

        if (status == COMMAND_GO_ON)
                status = run(&o, &paths, &c);
        for (size_t i = 0; i < c.count; i++)
                report_free(&c.sources[i]);
        free(c.sources);
        paths_free(&paths);
        opts_free(&report_spec, &o, &parsed);
        return status;
}
