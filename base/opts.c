#include "opts.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "conf.h"
#include "err.h"

#define QUOTE_BYTES  64
#define HELP_COLUMNS 79
#define HELP_INDENT  24

/* ---- values ---- */

struct unit {
        const char *suffix;
        double scale;
};

/* A number from 0 with one of the units; the result is below 2^63 and rounded to an integer. */
static int with_unit(const char *text, const char *what, const struct unit *units, const char *wanted, uint64_t *out)
{
        size_t digits = strspn(text, "0123456789.");
        char *end = NULL;
        double v = digits ? strtod(text, &end) : -1;

        for (; v >= 0 && end == text + digits && units->suffix; units++) {
                if (strcmp(end, units->suffix) != 0)
                        continue;
                v *= units->scale;
                if (v >= 0x1p63)
                        break;
                *out = (uint64_t)llround(v);
                return 0;
        }
        return err_set(-EINVAL, "%s: expected %s, not '%.*s'", what, wanted, QUOTE_BYTES, text);
}

int opts_size(const char *text, const char *what, uint64_t *bytes)
{
        static const struct unit units[] = {
            {"", 1},         {"B", 1},        {"K", 0x1p10},   {"M", 0x1p20},   {"G", 0x1p30},
            {"T", 0x1p40},   {"k", 0x1p10},   {"m", 0x1p20},   {"g", 0x1p30},   {"t", 0x1p40},
            {"KiB", 0x1p10}, {"MiB", 0x1p20}, {"GiB", 0x1p30}, {"TiB", 0x1p40}, {NULL, 0},
        };

        return with_unit(text, what, units, "a size such as 64, 4K, 1M or 2G", bytes);
}

int opts_duration(const char *text, const char *what, uint64_t *ns)
{
        static const struct unit units[] = {
            {"", 1e9}, {"s", 1e9},  {"ms", 1e6},   {"us", 1e3}, {"µs", 1e3},
            {"ns", 1}, {"m", 60e9}, {"h", 3600e9}, {NULL, 0},
        };

        return with_unit(text, what, units, "a duration such as 10s, 200us, 5ms or 2m", ns);
}

static bool no_limit(const struct opt *o)
{
        return o->min == 0 && o->max == 0;
}

static int out_of_range(const struct opt *o, const char *text)
{
        return err_set(-EINVAL, "--%s: %.*s is out of range; expected %.15g to %.15g%s", o->name, QUOTE_BYTES, text,
                       o->min, o->max,
                       o->type == OPT_SIZE       ? " bytes"
                       : o->type == OPT_DURATION ? " nanoseconds"
                                                 : "");
}

static int set_str(const struct opt *o, const char *text, void *slot)
{
        *(const char **)slot = text;
        return 0;
}

static int set_int(const struct opt *o, const char *text, void *slot)
{
        const char *digits = text + (*text == '-' || *text == '+');
        char *end;

        errno = 0;
        long long v = strtoll(text, &end, 10);

        if (*digits < '0' || *digits > '9' || *end)
                return err_set(-EINVAL, "--%s: expected an integer, not '%.*s'", o->name, QUOTE_BYTES, text);
        if (errno == ERANGE)
                return err_set(-EINVAL, "--%s: %.*s does not fit 64 bits", o->name, QUOTE_BYTES, text);
        if (!no_limit(o) && ((double)v < o->min || (double)v > o->max))
                return out_of_range(o, text);
        *(int64_t *)slot = v;
        return 0;
}

static int set_num(const struct opt *o, const char *text, void *slot)
{
        char *end = NULL;
        double v = text[0] && !text[strspn(text, "+-.0123456789eE")] ? strtod(text, &end) : NAN;

        if (!end || *end || !isfinite(v))
                return err_set(-EINVAL, "--%s: expected a number, not '%.*s'", o->name, QUOTE_BYTES, text);
        if (!no_limit(o) && (v < o->min || v > o->max))
                return out_of_range(o, text);
        *(double *)slot = v;
        return 0;
}

static int set_measure(const struct opt *o, const char *text, void *slot)
{
        char what[QUOTE_BYTES];
        uint64_t v;

        snprintf(what, sizeof(what), "--%s", o->name);
        int rc = o->type == OPT_SIZE ? opts_size(text, what, &v) : opts_duration(text, what, &v);

        if (rc < 0)
                return rc;
        if (!no_limit(o) && ((double)v < o->min || (double)v > o->max))
                return out_of_range(o, text);
        *(uint64_t *)slot = v;
        return 0;
}

/* "a|b|c" */
static const char *choice_words(const struct opt *o, char *buf, size_t room)
{
        size_t used = 0;

        buf[0] = '\0';
        for (size_t i = 0; o->choices[i] && used < room; i++)
                used += (size_t)snprintf(buf + used, room - used, "%s%s", i ? "|" : "", o->choices[i]);
        return buf;
}

static int set_choice(const struct opt *o, const char *text, void *slot)
{
        char words[256];

        for (int i = 0; o->choices[i]; i++) {
                if (strcmp(text, o->choices[i]) != 0)
                        continue;
                *(int *)slot = i;
                return 0;
        }
        return err_set(-EINVAL, "--%s: expected one of %s, not '%.*s'", o->name, choice_words(o, words, sizeof(words)),
                       QUOTE_BYTES, text);
}

static int set_list(const struct opt *o, const char *text, void *slot)
{
        struct opt_list *list = slot;
        const char **bigger = reallocarray(list->at, list->count + 1, sizeof(*bigger));

        if (!bigger)
                return err_set(-ENOMEM, "--%s: no memory", o->name);
        list->at = bigger;
        list->at[list->count++] = text;
        return 0;
}

static int (*const setters[])(const struct opt *, const char *, void *) = {
    [OPT_STR] = set_str,          [OPT_INT] = set_int,       [OPT_NUM] = set_num,   [OPT_SIZE] = set_measure,
    [OPT_DURATION] = set_measure, [OPT_CHOICE] = set_choice, [OPT_LIST] = set_list,
};

static int set_value(const struct opt *o, const char *text, void *out)
{
        return setters[o->type](o, text, (char *)out + o->offset);
}

/* ---- parsing ---- */

struct scan {
        const struct opts_spec *spec;
        int argc, at;
        char *const *argv;
        void *out;
        struct opts_parsed *parsed;
};

static bool same_name(const char *name, const char *word, size_t len)
{
        return name && strlen(name) == len && memcmp(name, word, len) == 0;
}

static const struct opt *find(const struct opts_spec *spec, const char *word, size_t len)
{
        for (size_t i = 0; i < spec->count; i++)
                if (same_name(spec->table[i].name, word, len) || same_name(spec->table[i].also, word, len))
                        return &spec->table[i];
        return NULL;
}

static int unknown_option(const struct opts_spec *spec, const char *arg)
{
        const char *names[OPTS_MAX + 2];
        char word[QUOTE_BYTES + 1];
        size_t len = strcspn(arg, "="), n = 0;

        if (len > QUOTE_BYTES)
                len = QUOTE_BYTES;
        for (size_t i = 0; i < spec->count; i++)
                if (spec->table[i].help)
                        names[n++] = spec->table[i].name;
        names[n++] = "help";
        names[n] = NULL;
        memcpy(word, arg, len);
        word[len] = '\0';
        const char *near = conf_nearest(word + strspn(word, "-"), names);

        if (near)
                return err_set(-EINVAL, "%s: unknown option %s; did you mean --%s?", spec->name, word, near);
        return err_set(-EINVAL, "%s: unknown option %s; '%s --help' lists them", spec->name, word, spec->name);
}

/* Values that stand in arguments of their own, behind the option. */
static int take_values(struct scan *s, const struct opt *o)
{
        bool list = o->type == OPT_LIST;
        int rc = 0, first = s->at;

        while (rc == 0 && s->at < s->argc && (list || s->at == first)) {
                const char *arg = s->argv[s->at];

                if (list ? arg[0] == '-' && arg[1] : strncmp(arg, "--", 2) == 0)
                        break;
                s->at++;
                rc = set_value(o, arg, s->out);
        }
        if (s->at == first)
                return err_set(-EINVAL, "--%s needs a value%s%s", o->name, o->metavar ? ": " : "",
                               o->metavar ? o->metavar : "");
        return rc;
}

static int take_option(struct scan *s, const char *arg)
{
        size_t len = strcspn(arg + 2, "=");
        const struct opt *o = find(s->spec, arg + 2, len);
        const char *value = arg[2 + len] ? arg + 3 + len : NULL;

        if (!o)
                return unknown_option(s->spec, arg);
        uint64_t bit = 1ull << (o - s->spec->table);

        if ((s->parsed->given & bit) && o->type != OPT_LIST && o->type != OPT_FLAG)
                return err_set(-EINVAL, "--%s is given twice", o->name);
        s->parsed->given |= bit;
        if (o->type != OPT_FLAG)
                return value ? set_value(o, value, s->out) : take_values(s, o);
        if (value)
                return err_set(-EINVAL, "--%s takes no value", o->name);
        *(bool *)((char *)s->out + o->offset) = true;
        return 0;
}

static int take_arg(struct scan *s, const char *arg)
{
        if (s->parsed->nargs >= s->spec->args_max && s->spec->args_max == 0)
                return err_set(-EINVAL, "%s: unexpected argument '%.*s'", s->spec->name, QUOTE_BYTES, arg);
        if (s->parsed->nargs >= s->spec->args_max)
                return err_set(-EINVAL, "%s: one argument too many: '%.*s'; expected %s", s->spec->name, QUOTE_BYTES,
                               arg, s->spec->args_what);
        s->parsed->args[s->parsed->nargs++] = arg;
        return 0;
}

static bool wants_help(int argc, char *const *argv)
{
        for (int i = 0; i < argc && strcmp(argv[i], "--") != 0; i++)
                if (strcmp(argv[i], "-h") == 0 || strcmp(argv[i], "--help") == 0)
                        return true;
        return false;
}

static int take_presets(const struct opts_spec *spec, void *out)
{
        int rc = 0;

        for (size_t i = 0; i < spec->count && rc == 0; i++)
                if (spec->table[i].preset && spec->table[i].type != OPT_LIST && spec->table[i].type != OPT_FLAG)
                        rc = set_value(&spec->table[i], spec->table[i].preset, out);
        /* The table is ours: a default that it refuses is our mistake. */
        BUG_ON(rc < 0);
        return rc;
}

static int check_complete(const struct opts_spec *spec, const struct opts_parsed *parsed)
{
        for (size_t i = 0; i < spec->count; i++)
                if (spec->table[i].required && !(parsed->given >> i & 1))
                        return err_set(-EINVAL, "%s: --%s %s is missing", spec->name, spec->table[i].name,
                                       spec->table[i].metavar ? spec->table[i].metavar : "");
        if (parsed->nargs < spec->args_min)
                return err_set(-EINVAL, "%s: expected %s, got %zu", spec->name, spec->args_what, parsed->nargs);
        return 0;
}

static int scan_all(struct scan *s)
{
        bool options = true;
        int rc = 0;

        while (rc == 0 && s->at < s->argc) {
                const char *arg = s->argv[s->at++];

                if (options && strcmp(arg, "--") == 0)
                        options = false;
                else if (options && strncmp(arg, "--", 2) == 0)
                        rc = take_option(s, arg);
                else if (options && arg[0] == '-' && arg[1])
                        rc = unknown_option(s->spec, arg);
                else
                        rc = take_arg(s, arg);
        }
        return rc;
}

int opts_parse(const struct opts_spec *spec, int argc, char *const *argv, void *out, struct opts_parsed *parsed)
{
        struct scan s = {.spec = spec, .argc = argc, .argv = argv, .out = out, .parsed = parsed};

        BUG_ON(spec->count > OPTS_MAX);
        *parsed = (struct opts_parsed){.help = wants_help(argc, argv)};
        take_presets(spec, out);
        if (parsed->help)
                return 0;
        parsed->args = calloc((size_t)spec->args_max + 1, sizeof(*parsed->args));
        if (!parsed->args)
                return err_set(-ENOMEM, "%s: no memory", spec->name);
        int rc = scan_all(&s);

        return rc < 0 ? rc : check_complete(spec, parsed);
}

void opts_free(const struct opts_spec *spec, void *out, struct opts_parsed *parsed)
{
        for (size_t i = 0; i < spec->count; i++) {
                struct opt_list *list = (struct opt_list *)((char *)out + spec->table[i].offset);

                if (spec->table[i].type != OPT_LIST)
                        continue;
                free(list->at);
                *list = (struct opt_list){0};
        }
        free(parsed->args);
        parsed->args = NULL;
        parsed->nargs = 0;
}

bool opts_given(const struct opts_spec *spec, const struct opts_parsed *parsed, const char *name)
{
        const struct opt *o = find(spec, name, strlen(name));

        BUG_ON(!o);
        return parsed->given >> (o - spec->table) & 1;
}

/* ---- help ---- */

/* What stands behind the name: the metavar, or the words of a choice. */
static const char *value_of(const struct opt *o, char *buf, size_t room)
{
        if (o->metavar || o->type == OPT_FLAG)
                return o->metavar ? o->metavar : "";
        return o->type == OPT_CHOICE ? choice_words(o, buf, room) : "VALUE";
}

/* Characters on the screen: UTF-8's continuation bytes take no room. */
static size_t columns(const char *s, size_t bytes)
{
        size_t n = 0;

        for (size_t i = 0; i < bytes; i++)
                n += ((unsigned char)s[i] & 0xc0) != 0x80;
        return n;
}

/* Prints words of text, the cursor being in column `at`, breaking before HELP_COLUMNS; returns the column. */
static size_t wrap(FILE *to, const char *text, size_t at, size_t indent)
{
        while (*text) {
                size_t len = strcspn(text, " \n"), width = columns(text, len);

                if (at > indent && at + 1 + width > HELP_COLUMNS) {
                        fprintf(to, "\n%*s", (int)indent, "");
                        at = indent;
                } else if (at > indent) {
                        fputc(' ', to);
                        at++;
                }
                fwrite(text, 1, len, to);
                at += width;
                text += len + (text[len] == ' ');
                if (*text == '\n') {
                        fprintf(to, "\n%*s", (int)indent, "");
                        at = indent;
                        text++;
                }
        }
        return at;
}

static void help_option(FILE *to, const struct opt *o)
{
        char words[256], left[320], preset[128];
        const char *value = value_of(o, words, sizeof(words));

        snprintf(left, sizeof(left), "  --%s%s%s%s", o->name, *value ? " " : "", value,
                 o->type == OPT_LIST ? "..." : "");
        size_t width = columns(left, strlen(left));

        fputs(left, to);
        if (width + 2 > HELP_INDENT)
                fprintf(to, "\n%*s", HELP_INDENT, "");
        else
                fprintf(to, "%*s", (int)(HELP_INDENT - width), "");
        size_t at = wrap(to, o->help, HELP_INDENT, HELP_INDENT);

        if (o->preset) {
                snprintf(preset, sizeof(preset), "(default %s)", o->preset);
                wrap(to, preset, at, HELP_INDENT);
        }
        fputc('\n', to);
}

void opts_help(FILE *to, const struct opts_spec *spec)
{
        fprintf(to, "Usage: %s %s\n", spec->name, spec->usage);
        if (spec->about) {
                fputc('\n', to);
                wrap(to, spec->about, 0, 0);
                fputc('\n', to);
        }
        if (spec->count)
                fputc('\n', to);
        for (size_t i = 0; i < spec->count; i++)
                if (spec->table[i].help)
                        help_option(to, &spec->table[i]);
}

/* ---- man page ---- */

static unsigned next_char(const char **s)
{
        const unsigned char *p = (const unsigned char *)*s;
        unsigned extra = p[0] >= 0xf0 ? 3 : p[0] >= 0xe0 ? 2 : p[0] >= 0xc0 ? 1 : 0;
        unsigned c = extra == 3 ? p[0] & 7u : extra == 2 ? p[0] & 15u : extra == 1 ? p[0] & 31u : p[0];

        for ((*s)++; extra && ((unsigned char)**s & 0xc0) == 0x80; extra--, (*s)++)
                c = c << 6 | ((unsigned char)**s & 0x3f);
        return c;
}

/* Text that roff takes literally. "\&" in front keeps a leading dot, and a word that is also a macro's name, from being
 * obeyed. */
static void man_text(FILE *to, const char *s)
{
        fputs("\\&", to);
        while (*s) {
                unsigned c = next_char(&s);

                if (c == '\\')
                        fputs("\\e", to);
                else if (c == '-')
                        fputs("\\-", to);
                else if (c == '"')
                        fputs("\\(dq", to);
                else if (c == '\n')
                        fputc(' ', to);
                else if (c > 0x7e)
                        fprintf(to, "\\[u%04X]", c);
                else
                        fputc((int)c, to);
        }
}

static void man_option(FILE *to, const struct opt *o)
{
        char words[256];
        const char *value = value_of(o, words, sizeof(words));

        fprintf(to, ".It Fl Fl %s", o->name);
        if (*value) {
                fputs(" Ar \"", to);
                man_text(to, value);
                fputs("\"", to);
        }
        fputs(o->type == OPT_LIST ? " ...\n" : "\n", to);
        man_text(to, o->help);
        if (o->preset) {
                fputs(" (default ", to);
                man_text(to, o->preset);
                fputs(")", to);
        }
        fputc('\n', to);
}

void opts_man(FILE *to, const struct opts_spec *spec)
{
        fputs(".Bl -tag -width Ds\n", to);
        for (size_t i = 0; i < spec->count; i++)
                if (spec->table[i].help)
                        man_option(to, &spec->table[i]);
        fputs(".El\n", to);
}
