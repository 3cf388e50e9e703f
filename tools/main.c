/* djinnbench: finds the subcommand and steps aside. */
#include <errno.h>
#include <string.h>

#include "check.h"
#include "manifest.h"
#include "tools.h"

static int not_built(const struct command *c)
{
        fprintf(stderr,
                "djinnbench %s: not part of this build, which was made with -Dtransport_only=true; "
                "build without that option\n",
                c->name);
        return EXIT_USAGE;
}

static int unknown(const char *name)
{
        const char *near = command_nearest(name);

        if (near)
                fprintf(stderr, "djinnbench: unknown command '%.64s'; did you mean '%s'?\n", name, near);
        else
                fprintf(stderr, "djinnbench: unknown command '%.64s'; 'djinnbench help' lists them\n", name);
        return EXIT_USAGE;
}

/* help [--man] [COMMAND]; --man is how the build makes the man pages, and not shown. */
static int help_main(int argc, char **argv)
{
        bool man = argc > 0 && strcmp(argv[0], "--man") == 0;
        int at = man ? 1 : 0;
        const struct command *c = NULL;

        if (argc > at + 1) {
                fprintf(stderr, "djinnbench help: one argument too many: '%.64s'; expected one command\n",
                        argv[at + 1]);
                return EXIT_USAGE;
        }
        if (argc > at && strcmp(argv[at], "--help") != 0 && strcmp(argv[at], "-h") != 0) {
                c = command_find(argv[at]);
                if (!c)
                        return unknown(argv[at]);
                if (!c->main)
                        return not_built(c);
        }
        if (man)
                man_print(stdout, c);
        else if (c)
                opts_help(stdout, c->spec);
        else
                help_overview(stdout);
        return EXIT_DONE;
}

static int version_main(int argc, char **argv)
{
        printf("djinnbench %s (%s)\n", manifest_version(), manifest_commit());
        return EXIT_DONE;
}

static const struct {
        const char *word;
        int (*main)(int argc, char **argv);
} own_words[] = {
    {"help", help_main}, {"--help", help_main}, {"-h", help_main}, {"--version", version_main}, {"-V", version_main},
};

static int dispatch(int argc, char **argv)
{
        const struct command *c;

        if (argc < 2) {
                help_overview(stderr);
                return EXIT_USAGE;
        }
        for (size_t i = 0; i < ARRAY_LEN(own_words); i++)
                if (strcmp(argv[1], own_words[i].word) == 0)
                        return own_words[i].main(argc - 2, argv + 2);
        c = command_find(argv[1]);
        if (!c)
                return unknown(argv[1]);
        if (!c->main)
                return not_built(c);
        return c->main(argc - 2, argv + 2);
}

int main(int argc, char **argv)
{
        int status = dispatch(argc, argv);

        /* A result that did not reach its file is no result: a full disk must not look like success. */
        if (fflush(stdout) != 0 || ferror(stdout)) {
                fprintf(stderr, "djinnbench: cannot write to standard output: %s\n", strerror(errno));
                return status == EXIT_DONE ? EXIT_ENVIRONMENT : status;
        }
        return status;
}
