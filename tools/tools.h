/*
 * Subcommands. NAME.c holds NAME_main and NAME_spec; the table is in command.c, and one line there is all that a new
 * subcommand needs: dispatch, help and man page come from the table.
 *
 * NAME_main gets the arguments behind the subcommand's name and returns the exit status. Results go to stdout,
 * diagnostics to stderr.
 */
#ifndef DJINN_TOOLS_H
#define DJINN_TOOLS_H

#include <stdio.h>

#include "opts.h"

/* Exit status of all but compare. */
enum exit_status { EXIT_DONE = 0, EXIT_INVALID = 1, EXIT_USAGE = 2, EXIT_ENVIRONMENT = 3 };

struct exit_text { /* NULL ends a list of them */
        int status;
        const char *text;
};

/* Weak, because a build may leave commands out (-Dtransport_only=true): those have no main here. */
#define COMMAND_DECLARE(name)                                            \
        extern const struct opts_spec name##_spec __attribute__((weak)); \
        int name##_main(int argc, char **argv) __attribute__((weak))

COMMAND_DECLARE(sweep);
COMMAND_DECLARE(serve);
COMMAND_DECLARE(perf);
COMMAND_DECLARE(report);
COMMAND_DECLARE(compare);
COMMAND_DECLARE(plan);
COMMAND_DECLARE(verify);
COMMAND_DECLARE(doctor);
COMMAND_DECLARE(list);

/* Only compare has statuses of its own. */
extern const struct exit_text compare_exits[] __attribute__((weak));

struct command {
        const char *name;
        const char *summary;                /* one line for `help` and the man page's title */
        int (*main)(int argc, char **argv); /* NULL: not part of this build */
        const struct opts_spec *spec;
        const char *example; /* command line for the man page */
        const char *example_about;
};

extern const struct command commands[]; /* ends with name NULL */
/* NULL when there is none of this name. */
const struct command *command_find(const char *name);
/* The nearest name for "did you mean", or NULL. */
const char *command_nearest(const char *name);

#define COMMAND_GO_ON (-1)
/* Parses the options of a command. COMMAND_GO_ON, or the exit status to return: help was printed (EXIT_DONE), or wrong
 * use was explained on stderr (EXIT_USAGE). Call opts_free in every case. */
int command_parse(const struct opts_spec *spec, int argc, char **argv, void *out, struct opts_parsed *parsed);
/* Prints "djinnbench list: <the error's sentence>" to stderr and returns status. */
int command_fail(const struct opts_spec *spec, int rc, enum exit_status status);

/* ---- help.c ---- */
void help_overview(FILE *to);
/* The man page, mdoc(7), of a command, or of the program where c is NULL. */
void man_print(FILE *to, const struct command *c);

#endif
