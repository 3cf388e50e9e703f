/* plan: what a baseline will do of a workload; touches no network. */
#include <errno.h>

#include "check.h"
#include "sweep.h"
#include "tools.h"

struct plan_cli {
        const char *config, *workload, *baseline;
        struct opt_list model_roots;
};

#define O(n, t, f, ...)                                                           \
        {                                                                         \
                n, .type = t, .offset = offsetof(struct plan_cli, f), __VA_ARGS__ \
        }
static const struct opt plan_options[] = {
    O("config", OPT_STR, config, .metavar = "FILE", .required = true, .help = "as for sweep"),
    O("workload", OPT_STR, workload, .metavar = "W", .required = true, .help = "one of the config's"),
    O("baseline", OPT_STR, baseline, .metavar = "B", .required = true,
      .help = "one of the config's, or a preset that `djinnbench list` names"),
    O("model-root", OPT_LIST, model_roots, .metavar = "DIR", .help = "folders of models, before DJINN_MODEL_PATH"),
};
#undef O

const struct opts_spec plan_spec = {
    .name = "djinnbench plan",
    .usage = "--config FILE --workload W --baseline B",
    .about = "Prints the calls that a baseline makes of one request: nodes, positions, bytes each way, round trips and "
             "work. The sweep's counters must agree with it to the byte.",
    .table = plan_options,
    .count = ARRAY_LEN(plan_options),
};

int plan_main(int argc, char **argv)
{
        static struct experiment e;
        struct plan_cli cli = {0};
        struct opts_parsed parsed;
        struct sweep_opts o = {.exp = &e};
        int status = command_parse(&plan_spec, argc, argv, &cli, &parsed), rc;

        if (status == COMMAND_GO_ON) {
                rc = experiment_load(cli.config, &e);
                o.model_roots = cli.model_roots.at, o.nmodel_roots = cli.model_roots.count;
                if (rc == 0) {
                        rc = sweep_plan(&o, cli.workload, cli.baseline, stdout);
                        experiment_free(&e);
                }
                status =
                    rc < 0 ? command_fail(&plan_spec, rc, rc == -ENODEV ? EXIT_ENVIRONMENT : EXIT_USAGE) : EXIT_DONE;
        }
        opts_free(&plan_spec, &cli, &parsed);
        return status;
}
