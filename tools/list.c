/* list: what there is, each "available" or the reason why not. It asks the tables themselves and nothing else, so that a
 * new backend, device, workload or baseline is listed without a change here. */
#include <stdbool.h>
#include <stdlib.h>

#include "check.h"
#include "json.h"
#include "tools.h"
#include "transport.h"

#ifdef WITH_MODELS
#include "baseline.h"
#include "device.h"
#include "workload.h"
#endif

struct list_opts {
        bool json;
};

static const struct opt list_options[] = {
    {"json", .type = OPT_FLAG, .offset = offsetof(struct list_opts, json),
     .help = "print one JSON object: a list of {name, available, reason, what} per section"},
};

const struct opts_spec list_spec = {
    .name = "djinnbench list",
    .usage = "[--json]",
    .about = "Lists transports, devices, workloads and baselines, each with \"available\" or the reason why it is not.",
    .table = list_options,
    .count = ARRAY_LEN(list_options),
};

static json *section(json *all, const char *name)
{
        json *list = json_array();

        json_set(all, name, list);
        return list;
}

static void entry(json *list, const char *name, const char *reason, const char *what)
{
        json *e = json_object();

        json_set_str(e, "name", name);
        json_set_bool(e, "available", reason == NULL);
        json_set_str(e, "reason", reason);
        json_set_str(e, "what", what);
        json_push(list, e);
}

static json *collect(void)
{
        json *all = json_object(), *list = section(all, "transports");

        for (const struct tp_backend *b = tp_backends; b->scheme; b++)
                entry(list, b->scheme, tp_unavailable(b), b->what);
#ifdef WITH_MODELS
        list = section(all, "devices");
        for (const struct dev_kind *k = dev_kinds; k->name; k++)
                entry(list, k->name, dev_unavailable(k), k->what);
        list = section(all, "workloads");
        for (const struct workload_kind *k = workload_kinds; k->implementation; k++)
                entry(list, k->implementation, k->reason, k->what);
        list = section(all, "baselines");
        for (const struct baseline_def *const *d = baseline_defs; *d; d++)
                entry(list, (*d)->name, (*d)->reason, (*d)->what);
#endif
        return all;
}

static void print_section(const json *list)
{
        printf("%s:\n", json_key(list));
        for (const json *e = json_first(list); e; e = json_next(e)) {
                const char *reason = json_str(json_get(e, "reason"), NULL);

                printf("  %-22s %s\n", json_str(json_get(e, "name"), ""), json_str(json_get(e, "what"), ""));
                printf("  %-22s %s%s\n", "", reason ? "not available: " : "available", reason ? reason : "");
        }
}

int list_main(int argc, char **argv)
{
        struct list_opts o = {0};
        struct opts_parsed parsed;
        int status = command_parse(&list_spec, argc, argv, &o, &parsed);

        opts_free(&list_spec, &o, &parsed);
        if (status != COMMAND_GO_ON)
                return status;
        json *all = collect();

        if (o.json) {
                char *text = json_text(all, true);

                puts(text);
                free(text);
        } else {
                for (const json *list = json_first(all); list; list = json_next(list)) {
                        print_section(list);
                        if (json_next(list))
                                putchar('\n');
                }
#ifndef WITH_MODELS
                puts("\nThis build has no devices, workloads or baselines: -Dtransport_only=true.");
#endif
        }
        json_free(all);
        return EXIT_DONE;
}
