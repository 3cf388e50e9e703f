/*
 * doctor: what this host can do, why the rest is off, what would mend it, and who may; with --peer, whether this host and
 * a listener work together. The probes are a table; what each finds is JSON first, and the screen is printed from it.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "doctor_inside.h"
#include "err.h"
#include "manifest.h"
#include "tools.h"
#include "transport.h"

#ifdef WITH_MODELS
#include "device.h"
#endif

#define COLUMNS     100
#define TEXT_COLUMN 25
#define SYS_ADMIN   21 /* the capability's number */

struct doctor_opts {
        bool json;
        const char *root; /* tests put a tree of their own in the place of / */
        struct doctor_peer_opts peer;
};

/* ---- what several probes ask ---- */

const char *doctor_no_transport(const char *scheme)
{
        for (const struct tp_backend *b = tp_backends; b->scheme; b++)
                if (strcmp(b->scheme, scheme) == 0)
                        return tp_unavailable(b);
        return "there is no transport of this name";
}

const char *doctor_no_device(const char *name)
{
#ifdef WITH_MODELS
        for (const struct dev_kind *k = dev_kinds; k->name; k++)
                if (strcmp(k->name, name) == 0)
                        return dev_unavailable(k);
        return "not part of this build: this version has no CUDA device";
#else
        return "not part of this build, which has the transports only";
#endif
}

/* ---- the table ---- */

static void probe_transports(struct doctor *d)
{
        for (const struct tp_backend *b = tp_backends; b->scheme; b++) {
                const char *reason = tp_unavailable(b);

                if (!reason) {
                        doctor_find(d, DOC_OK, b->scheme, "%s", b->what);
                        continue;
                }
                doctor_find(d, DOC_OFF, b->scheme, "%s", b->what);
                doctor_why(d, "%s", reason);
        }
}

static const struct {
        const char *section;
        void (*look)(struct doctor *d);
} probes[] = {
    {"host", doctor_probe_kernel}, {"host", doctor_probe_machine},   {"host", doctor_probe_cores},
    {"host", doctor_probe_quota},  {"host", doctor_probe_governor},  {"host", doctor_probe_clock},
    {"host", doctor_probe_numa},   {"memory", doctor_probe_memlock}, {"memory", doctor_probe_huge_pages},
    {"memory", doctor_probe_shm},  {"rdma", doctor_probe_rdma},      {"rdma", doctor_probe_rdma_access},
    {"gpu", doctor_probe_gpu},     {"gpu", doctor_probe_gpu_module}, {"gpu", doctor_probe_gpudirect},
    {"gpu", doctor_probe_acs},     {"dpdk", doctor_probe_dpdk},      {"dpdk", doctor_probe_vfio},
    {"dpdk", doctor_probe_iommu},  {"transports", probe_transports},
};

/* Root of a container that may not load modules is no administrator; nor is root of a user namespace, whose capabilities
 * end at its own border. */
static bool is_superuser(const struct doctor *d)
{
        char caps[DOC_TEXT], map[DOC_TEXT], *status = doctor_text(d, "/proc/self/status");
        unsigned long inside = 1, outside = 1, count = 0;

        doctor_line(status, "CapEff", caps);
        free(status);
        doctor_look(d, map, "/proc/self/uid_map");
        return strtoull(caps, NULL, 16) >> SYS_ADMIN & 1 &&
               sscanf(map, "%lu %lu %lu", &inside, &outside, &count) == 3 && inside == 0 && outside == 0 &&
               count == 4294967295ul;
}

/* ---- printing ---- */

static const char *field(const json *f, const char *key)
{
        return json_str(json_get(f, key), NULL);
}

/* Prints text from where the cursor is (at), broken at blanks before the last column; further lines begin at column. */
static void print_wrapped(const char *text, int at, int column)
{
        bool first = true; /* word of the line */

        while (*text) {
                int word = (int)strcspn(text, " "), room = COLUMNS - column;

                word = word <= room ? word : room; /* a longer one fills lines */
                if (at + !first + word > COLUMNS) {
                        printf("\n%*s", column, "");
                        at = column;
                } else if (!first) {
                        putchar(' ');
                        at++;
                }
                printf("%.*s", word, text);
                at += word;
                text += word;
                text += strspn(text, " ");
                first = false;
        }
        putchar('\n');
}

static void print_finding(const json *f)
{
        const char *mend = field(f, "mend"), *why = field(f, "why");
        int used = printf("  %-8s %-13s ", field(f, "verdict"), field(f, "finding"));

        if (used > TEXT_COLUMN)
                printf("\n%*s", TEXT_COLUMN, "");
        print_wrapped(field(f, "state"), TEXT_COLUMN, TEXT_COLUMN);
        if (why) {
                printf("%*swhy: ", TEXT_COLUMN, "");
                print_wrapped(why, TEXT_COLUMN + 5, TEXT_COLUMN + 5);
        }
        if (mend) {
                bool you = strcmp(field(f, "who"), "you") == 0;

                printf("%*smend (%s): ", TEXT_COLUMN, "", you ? "you" : "administrator");
                print_wrapped(mend, TEXT_COLUMN + (you ? 12 : 22), TEXT_COLUMN + 5);
        }
}

static int count_of(const json *findings, const char *verdict)
{
        int n = 0;

        for (const json *f = json_first(findings); f; f = json_next(f))
                n += strcmp(field(f, "verdict"), verdict) == 0;
        return n;
}

static void print_screen(const json *findings)
{
        const char *section = "";

        for (const json *f = json_first(findings); f; f = json_next(f)) {
                if (strcmp(field(f, "section"), section) != 0) {
                        printf("%s%s\n", *section ? "\n" : "", field(f, "section"));
                        section = field(f, "section");
                }
                print_finding(f);
        }
        printf("\n");
        for (size_t i = 0; i <= DOC_UNKNOWN; i++)
                printf("%s%d %s", i ? ", " : "", count_of(findings, doctor_verdict_names[i]), doctor_verdict_names[i]);
        printf("\n");
}

static void print_json(struct doctor *d, const struct doctor_opts *o, bool works)
{
        json *all = json_object();
        char *text;

        json_set_str(all, "schema", "djinnbench.doctor/1");
        json_set(all, "host", manifest_host());
        if (o->peer.url) {
                json_set_str(all, "peer", o->peer.url);
                json_set_bool(all, "works", works);
        }
        json_set(all, "findings", json_copy(d->findings));
        text = json_text(all, true);
        puts(text);
        free(text);
        json_free(all);
}

/* ---- the command ---- */

static const struct opt doctor_options[] = {
    {"peer", .metavar = "URL", .type = OPT_STR, .offset = offsetof(struct doctor_opts, peer.url),
     .help = "look at the pair instead: name, route, GID, MTU, port, who listens, key, versions"},
    {"key-file", .metavar = "FILE", .type = OPT_STR, .offset = offsetof(struct doctor_opts, peer.key_file),
     .help = "with --peer: the key that both ends should hold; default $DJINN_KEY_FILE"},
    {"timeout", .metavar = "TIME", .type = OPT_DURATION, .offset = offsetof(struct doctor_opts, peer.timeout_ns),
     .min = 1e8, .max = 3.6e12, .preset = "5s", .help = "with --peer: for everything together"},
    {"json", .type = OPT_FLAG, .offset = offsetof(struct doctor_opts, json),
     .help = "print one JSON object: schema, host, findings[] of {section, finding, verdict, state, why, mend, who, "
             "facts}; with --peer also peer and works"},
    {"root", .metavar = "DIR", .type = OPT_STR, .offset = offsetof(struct doctor_opts, root)},
};

const struct opts_spec doctor_spec = {
    .name = "djinnbench doctor",
    .usage = "[--peer URL] [--json]",
    .about = "Says what this host can do, why the rest is off, what would mend it, and whether you can or an "
             "administrator must. It looks and changes nothing. What is off is no error: the exit status is 0. With "
             "--peer it says whether this host and that listener work together; if not, the exit status is 3.",
    .table = doctor_options,
    .count = ARRAY_LEN(doctor_options),
};

static int check_use(const struct doctor_opts *o, const struct opts_parsed *parsed)
{
        struct tp_url u;

        if (o->peer.url && tp_url_parse(o->peer.url, &u) < 0)
                return err_trail(-EINVAL, "in --peer");
        if (!o->peer.url &&
            (opts_given(&doctor_spec, parsed, "key-file") || opts_given(&doctor_spec, parsed, "timeout")))
                return err_set(-EINVAL, "--key-file and --timeout are for --peer URL");
        return 0;
}

int doctor_main(int argc, char **argv)
{
        struct doctor_opts o = {.root = ""};
        struct opts_parsed parsed;
        int status = command_parse(&doctor_spec, argc, argv, &o, &parsed);
        int rc = status == COMMAND_GO_ON ? check_use(&o, &parsed) : 0;

        opts_free(&doctor_spec, &o, &parsed);
        if (status != COMMAND_GO_ON)
                return status;
        if (rc < 0)
                return command_fail(&doctor_spec, rc, EXIT_USAGE);
        struct doctor d = {.root = o.root, .section = "pair", .findings = json_array()};
        bool works = true;

        d.superuser = is_superuser(&d);
        if (o.peer.url)
                works = doctor_peer(&d, &o.peer);
        for (size_t i = 0; i < ARRAY_LEN(probes) && !o.peer.url; i++) {
                d.section = probes[i].section;
                probes[i].look(&d);
        }
        if (o.json)
                print_json(&d, &o, works);
        else
                print_screen(d.findings);
        json_free(d.findings);
        return works ? EXIT_DONE : EXIT_ENVIRONMENT;
}
