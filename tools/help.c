/* Help screens and man pages: both are printed from the table of commands and from each command's table of options. */
#include <ctype.h>
#include <string.h>

#include "check.h"
#include "manifest.h"
#include "tools.h"

#define MAN_DATE "November 22, 2026"

static const struct exit_text exit_texts[] = {
    {EXIT_DONE, "done, and every result is valid"},
    {EXIT_INVALID, "a result is invalid"},
    {EXIT_USAGE, "wrong use: an option, the configuration, a file"},
    {EXIT_ENVIRONMENT, "the environment: nothing listens, no permission, a device is missing"},
    {0, NULL},
};

static const struct environment_text {
        const char *name;
        const char *text;
} environment_texts[] = {
    {"DJINN_SERVER_ADDRESS", "the server's URL where neither an option nor the configuration names one"},
    {"DJINN_MODEL_PATH", "folders in which models are looked up, separated by colons"},
    {"DJINN_KEY_FILE", "the key file where --key-file is not given"},
    {"DJINN_LOG", "error, warn, info or debug: which diagnostics are printed"},
    {"GENIE_SERVER_ADDRESS", "as DJINN_SERVER_ADDRESS, which goes before it"},
    {"HF_HUB_CACHE, HF_HOME", "where downloaded models are found; they are only read"},
};

void help_overview(FILE *to)
{
        fputs("djinnbench measures what it costs to run a model on an accelerator at the other\n"
              "end of a network, and says where the cost goes.\n"
              "\n"
              "Usage: djinnbench COMMAND [options]\n"
              "       djinnbench help [COMMAND]\n"
              "       djinnbench --version\n\n",
              to);
        for (const struct command *c = commands; c->name; c++)
                fprintf(to, "  %-8s %s%s\n", c->name, c->summary, c->main ? "" : " (not built)");
        fputs("\nExit status (compare has its own):\n", to);
        for (const struct exit_text *e = exit_texts; e->text; e++)
                fprintf(to, "  %d        %s\n", e->status, e->text);
}

/* Text that roff takes literally: no escapes, no hyphens that may become dashes, and nothing at the start of a line that
 * could be taken for a request. */
static void man_text(FILE *to, const char *s)
{
        bool start = true;

        for (; *s; s++) {
                if (start && (*s == '.' || *s == '\''))
                        fputs("\\&", to);
                start = *s == '\n';
                if (*s == '\\')
                        fputs("\\e", to);
                else if (*s == '-')
                        fputs("\\-", to);
                else
                        fputc(*s, to);
        }
}

/* An argument of a macro: quoted. */
static void man_quoted(FILE *to, const char *s)
{
        fputs(" \"\\&", to);
        for (; *s; s++) {
                if (*s == '"')
                        fputs("\\(dq", to);
                else if (*s == '\\')
                        fputs("\\e", to);
                else
                        fputc(*s, to);
        }
        fputs("\"\n", to);
}

/* Paragraphs are parted by empty lines, which mdoc wants as requests; the breaks inside one are the screen's. */
static void man_paragraphs(FILE *to, const char *s)
{
        while (*s) {
                const char *end = strstr(s, "\n\n");
                char line[2048];

                snprintf(line, sizeof(line), "%.*s", end ? (int)(end - s) : (int)strlen(s), s);
                man_text(to, line);
                fputc('\n', to);
                s = end ? end + 2 : s + strlen(s);
                if (*s)
                        fputs(".Pp\n", to);
        }
}

static void man_head(FILE *to, const char *name, const char *summary)
{
        char upper[64];
        size_t n = 0;

        for (; name[n] && n + 1 < sizeof(upper); n++)
                upper[n] = (char)toupper((unsigned char)name[n]);
        upper[n] = '\0';
        fprintf(to, ".Dd %s\n.Dt %s 1\n.Os djinnbench %s\n", MAN_DATE, upper, manifest_version());
        fprintf(to, ".Sh NAME\n.Nm %s\n.Nd ", name);
        man_text(to, summary);
        fputc('\n', to);
}

static void man_exit(FILE *to, const struct exit_text *texts)
{
        fputs(".Sh EXIT STATUS\n.Bl -tag -width Ds\n", to);
        for (const struct exit_text *e = texts; e->text; e++) {
                fprintf(to, ".It %d\n", e->status);
                man_text(to, e->text);
                fputc('\n', to);
        }
        fputs(".El\n", to);
}

static void man_environment(FILE *to)
{
        fputs(".Sh ENVIRONMENT\n.Bl -tag -width Ds\n", to);
        for (size_t i = 0; i < ARRAY_LEN(environment_texts); i++) {
                fputs(".It", to);
                man_quoted(to, environment_texts[i].name);
                man_text(to, environment_texts[i].text);
                fputc('\n', to);
        }
        fputs(".El\n", to);
}

static void man_program(FILE *to)
{
        man_head(to, "djinnbench", "measure what it costs to run a model at the other end of a network");
        fputs(".Sh SYNOPSIS\n.Nm\n.Ar command\n.Op Ar options\n.Nm\n.Cm help\n.Op Ar command\n.Nm\n.Fl Fl version\n"
              ".Sh DESCRIPTION\n"
              "One host runs a model, another has the application, and\n.Nm\n"
              "says what lies between them: the wire, the framework, extra work, or the work itself.\n"
              "Every baseline does the same job, and a row that did not is marked and not counted.\n"
              ".Pp\nThe commands are:\n.Bl -tag -width Ds\n",
              to);
        for (const struct command *c = commands; c->name; c++) {
                if (!c->main)
                        continue;
                fprintf(to, ".It Xr djinnbench-%s 1\n", c->name);
                man_text(to, c->summary);
                fputc('\n', to);
        }
        fputs(".El\n", to);
        man_environment(to);
        man_exit(to, exit_texts);
        fputs(".Sh SECURITY\n"
              "Off loopback both sides need the same key, or both must say\n.Fl Fl insecure .\n"
              "The key authenticates both ends to each other.\n"
              "What crosses the wire afterwards is neither encrypted nor protected against change.\n",
              to);
}

static void man_command(FILE *to, const struct command *c)
{
        char name[64];

        snprintf(name, sizeof(name), "djinnbench-%s", c->name);
        man_head(to, name, c->summary);
        fputs(".Sh SYNOPSIS\n.Nm djinnbench Cm", to);
        fprintf(to, " %s\n", c->name);
        if (c->spec->usage[0])
                fputs(".Ar", to), man_quoted(to, c->spec->usage);
        fputs(".Sh DESCRIPTION\n", to);
        man_paragraphs(to, c->spec->about ? c->spec->about : c->summary);
        if (c->spec->count) {
                fputs(".Pp\nThe options are:\n", to);
                opts_man(to, c->spec);
        }
        man_exit(to, c->main == compare_main ? compare_exits : exit_texts);
        fputs(".Sh EXAMPLES\n", to);
        man_text(to, c->example_about);
        fputs("\n.Dl ", to);
        man_text(to, c->example);
        fputs("\n.Sh SEE ALSO\n.Xr djinnbench 1\n", to);
}

void man_print(FILE *to, const struct command *c)
{
        if (c)
                man_command(to, c);
        else
                man_program(to);
}
