#include "tools.h"

#include <string.h>

#include "conf.h"
#include "err.h"

#define COMMAND(name) name##_main, &name##_spec

const struct command commands[] = {
    {"sweep", "run a sweep of workloads and baselines and print its overhead table", COMMAND(sweep),
     "djinnbench sweep --config configs/smoke.yaml --model-root tests/fixtures",
     "Run the smoke test's sweep with an embedded server:"},
    {"serve", "serve models on this host's device to sweeps on other hosts", COMMAND(serve),
     "djinnbench serve --listen tcp://0.0.0.0:5556 --key-file key",
     "Listen on every address for clients that hold the same key:"},
    {"perf", "measure a transport alone: latency, bandwidth, message rate", COMMAND(perf),
     "djinnbench perf lat --transport shm --sizes 64,4K,1M",
     "Round trips through shared memory, both ends started here:"},
    {"report", "print overhead tables of stored results; measures nothing", COMMAND(report),
     "djinnbench report --table full --format csv --output table.csv",
     "Every column of every stored result, for a spreadsheet:"},
    {"compare", "compare two runs of perf or sweep, with a gate on each figure", COMMAND(compare),
     "djinnbench compare before.json after.json --metric p99:10 --format junit",
     "Two runs of perf --json, for a CI that reads JUnit:"},
    {"plan", "show what a baseline will do: steps, predicted bytes, round trips", COMMAND(plan),
     "djinnbench plan --config configs/smoke.yaml --workload gpt2_micro --baseline semantic_blind",
     "What a baseline that knows nothing of the model sends:"},
    {"verify", "check a model folder against the results stored with it", COMMAND(verify),
     "djinnbench verify --model tests/fixtures/gpt2-micro", "Run every case of the folder's reference.json:"},
    {"doctor", "say what this host can do and what would mend the rest", COMMAND(doctor), "djinnbench doctor --json",
     "The findings for a program to read:"},
    {"list", "list transports, devices, workloads and baselines", COMMAND(list), "djinnbench list",
     "What this build can use on this host:"},
    {0},
};

const struct command *command_find(const char *name)
{
        for (const struct command *c = commands; c->name; c++)
                if (strcmp(c->name, name) == 0)
                        return c;
        return NULL;
}

const char *command_nearest(const char *name)
{
        const char *names[sizeof(commands) / sizeof(commands[0]) + 1];
        size_t n = 0;

        for (const struct command *c = commands; c->name; c++)
                names[n++] = c->name;
        names[n++] = "help";
        names[n] = NULL;
        return conf_nearest(name, names);
}

int command_parse(const struct opts_spec *spec, int argc, char **argv, void *out, struct opts_parsed *parsed)
{
        int rc = opts_parse(spec, argc, argv, out, parsed);

        if (rc < 0)
                return command_fail(spec, rc, EXIT_USAGE);
        if (!parsed->help)
                return COMMAND_GO_ON;
        opts_help(stdout, spec);
        return EXIT_DONE;
}

int command_fail(const struct opts_spec *spec, int rc, enum exit_status status)
{
        const char *text = err_str(rc);
        size_t len = strlen(spec->name);

        /* Sentences about options name the command already. */
        if (strncmp(text, spec->name, len) == 0 && text[len] == ':')
                fprintf(stderr, "%s\n", text);
        else
                fprintf(stderr, "%s: %s\n", spec->name, text);
        return status;
}
