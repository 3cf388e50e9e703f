/*
 * Command-line options of a subcommand from one table, which is parser, range check, help screen and man page at once.
 *
 *   --name VALUE, --name=VALUE, --flag; "--" ends the options; what is no option is a positional argument; -h, --help.
 *
 * An option takes the next argument as its value unless that begins with "--". A list takes all arguments up to the
 * next one that begins with "-", and may be repeated. Scalars may stand once.
 */
#ifndef DJINN_BASE_OPTS_H
#define DJINN_BASE_OPTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

enum opt_type {
        OPT_FLAG,     /* bool */
        OPT_STR,      /* const char *, points into argv (or at preset) */
        OPT_INT,      /* int64_t in [min, max] */
        OPT_NUM,      /* double in [min, max] */
        OPT_SIZE,     /* uint64_t bytes in [min, max]: 64, 4K, 1M, 2G, 1T; powers of two */
        OPT_DURATION, /* uint64_t ns in [min, max]: 200us, 1.5s, 2m, 1h, ns, ms; a bare number is seconds */
        OPT_CHOICE,   /* int: index into choices */
        OPT_LIST,     /* struct opt_list of strings */
};

struct opt_list {
        const char **at; /* strings point into argv */
        size_t count;
};

struct opt {
        const char *name;    /* "config", without the dashes */
        const char *also;    /* a second spelling, accepted but not shown; or NULL */
        const char *metavar; /* "FILE"; NULL for flags; a choice shows its words when NULL */
        enum opt_type type;
        size_t offset;              /* into the struct that is filled */
        double min, max;            /* both 0: no limit; in the type's unit, exact to 2^53 */
        const char *const *choices; /* NULL-terminated */
        const char *preset;         /* default as typed: parsed first, shown in the help; NULL: as the struct was */
        const char *help;           /* NULL: accepted but not shown */
        bool required;
};

#define OPTS_MAX 64

struct opts_spec {
        const char *name;  /* "djinnbench sweep", stands in errors and usage */
        const char *usage; /* what follows the name: "--config FILE [options]" */
        const char *about; /* a paragraph or more; NULL: none */
        const struct opt *table;
        size_t count;                /* at most OPTS_MAX */
        unsigned args_min, args_max; /* positional arguments */
        const char *args_what;       /* "two result files": for messages; NULL where args_max is 0 */
};

struct opts_parsed {
        const char **args; /* positional arguments, strings of argv */
        size_t nargs;
        bool help;      /* -h or --help was there; nothing else was checked */
        uint64_t given; /* bit i: table[i] was on the command line */
};

/* Parses argv[0..argc) (without the program's and the subcommand's names) into *out. 0, or -EINVAL with a sentence.
 * opts_free in either case. */
int opts_parse(const struct opts_spec *spec, int argc, char *const *argv, void *out, struct opts_parsed *parsed);
/* Frees the lists in *out and the positional arguments. */
void opts_free(const struct opts_spec *spec, void *out, struct opts_parsed *parsed);
bool opts_given(const struct opts_spec *spec, const struct opts_parsed *parsed, const char *name);

/* The help screen, 80 columns. */
void opts_help(FILE *to, const struct opts_spec *spec);
/* The option list of a man page, mdoc(7): .Bl to .El. */
void opts_man(FILE *to, const struct opts_spec *spec);

/* For values that other places hold: as OPT_SIZE and OPT_DURATION. -EINVAL with a sentence naming `what`. */
int opts_size(const char *text, const char *what, uint64_t *bytes);
int opts_duration(const char *text, const char *what, uint64_t *ns);

#endif
