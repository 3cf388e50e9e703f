/* Types of everything that the tables read, as a tree of tables: what results/djinnbench.result.schema.json says, for
 * these fields. Unknown fields are ignored, so that a report can read a file with more in it. */
#include "report_inside.h"

#include <errno.h>
#include <string.h>

#include "check.h"
#include "err.h"

enum shape { STRING, NUMBER, BOOLEAN, OBJECT, ARRAY, MAP };

struct field {
        const char *key; /* NULL ends a table */
        enum shape shape;
        bool required;              /* else it may be null or absent */
        const struct field *inside; /* members of an object; the single entry of an array's element or map's value */
};

#define NUM(key)                         \
        {                                \
                key, NUMBER, false, NULL \
        }
#define STR(key)                         \
        {                                \
                key, STRING, false, NULL \
        }
#define FLAG(key)                         \
        {                                 \
                key, BOOLEAN, false, NULL \
        }
#define END                               \
        {                                 \
                NULL, NUMBER, false, NULL \
        }

static const struct field interval[] = {{"lo", NUMBER, true, NULL}, {"hi", NUMBER, true, NULL}, END};
static const struct field estimate[] = {NUM("value"), {"ci95", OBJECT, false, interval}, END};
static const struct field number_value[] = {NUM("")};
static const struct field string_element[] = {{"", STRING, true, NULL}};

#define ESTIMATE(key)                        \
        {                                    \
                key, OBJECT, false, estimate \
        }

static const struct field aggregate[] = {NUM("mean"),
                                         NUM("median"),
                                         NUM("p95"),
                                         NUM("min"),
                                         NUM("max"),
                                         NUM("sd"),
                                         NUM("n"),
                                         NUM("p90"),
                                         NUM("p95_bounded"),
                                         NUM("p99"),
                                         {"ci95", OBJECT, false, interval},
                                         END};
static const struct field aggregate_value[] = {{"", OBJECT, true, aggregate}};
static const struct field interval_value[] = {{"", OBJECT, false, interval}};
static const struct field direction[] = {NUM("payload_bytes"), NUM("header_bytes"),        NUM("messages"),
                                         NUM("copies_bytes"),  NUM("retransmitted_bytes"), END};
static const struct field predicted[] = {
    {"up", OBJECT, true, direction}, {"down", OBJECT, true, direction}, NUM("round_trips"), END};
static const struct field wire[] = {{"up", OBJECT, true, direction},
                                    {"down", OBJECT, true, direction},
                                    NUM("round_trips"),
                                    {"predicted", OBJECT, false, predicted},
                                    NUM("driver_copies"),
                                    END};
static const struct field decomposition[] = {ESTIMATE("latency_us"),
                                             ESTIMATE("native_us"),
                                             ESTIMATE("delta_us"),
                                             ESTIMATE("network_us"),
                                             ESTIMATE("extra_execution_us"),
                                             ESTIMATE("framework_overhead_us"),
                                             ESTIMATE("wire_floor_us"),
                                             ESTIMATE("network_difference_us"),
                                             END};
static const struct field work[] = {
    NUM("requests"),          NUM("tokens"), NUM("flop"),    NUM("flop_head"), NUM("weight_bytes"),
    NUM("weight_bytes_head"), NUM("ops"),    NUM("threads"), STR("device"),    END};
static const struct field roofline[] = {STR("bound"), NUM("share"), NUM("bytes_per_s"), NUM("flop_per_s"), END};
static const struct field equivalence[] = {STR("reference"),
                                           NUM("max_rel_l2"),
                                           NUM("tolerance"),
                                           FLAG("argmax_equal"),
                                           FLAG("digest_sensitive"),
                                           NUM("near_tie_position"),
                                           {"bit_equal_to", ARRAY, false, string_element},
                                           END};
static const struct field switch_set[] = {STR("weights"),    STR("call"),    STR("state"), STR("outputs"),
                                          STR("plan_cache"), STR("buffers"), END};
static const struct field switches[] = {
    {"requested", OBJECT, false, switch_set}, {"applied", OBJECT, false, switch_set}, END};
static const struct field residual[] = {NUM("median_ms"), NUM("server_median_ms"), NUM("limit_ms"), NUM("share_over"),
                                        END};
static const struct field cpu[] = {NUM("client"), NUM("server"), END};
static const struct field memory[] = {NUM("client_rss_bytes"), NUM("server_rss_bytes"), END};
static const struct field warmup[] = {NUM("requests"), FLAG("steady"), END};
static const struct field aa[] = {ESTIMATE("delta_us"), ESTIMATE("ratio"), END};
static const struct field validity[] = {{"verdict", STRING, true, NULL}, STR("reason"), END};
static const struct field spec[] = {STR("model_id"), END};
static const struct field metadata[] = {
    STR("unit_name"), STR("device"), STR("dtype"), {"spec", OBJECT, false, spec}, END};

static const struct field row[] = {{"baseline", STRING, true, NULL},
                                   {"runner_type", STRING, true, NULL},
                                   {"transport", STRING, true, NULL},
                                   STR("path"),
                                   FLAG("emulated"),
                                   {"runs", ARRAY, true, NULL},
                                   {"aggregates", MAP, true, aggregate_value},
                                   {"metadata", OBJECT, true, metadata},
                                   {"derived", MAP, true, number_value},
                                   {"ci", MAP, false, interval_value},
                                   {"work", OBJECT, false, work},
                                   {"wire", OBJECT, false, wire},
                                   {"breakdown", MAP, false, number_value},
                                   {"decomposition", OBJECT, false, decomposition},
                                   {"residual", OBJECT, false, residual},
                                   {"roofline", OBJECT, false, roofline},
                                   {"check", OBJECT, false, equivalence},
                                   STR("digest"),
                                   STR("weights"),
                                   STR("model_hash"),
                                   {"switches", OBJECT, false, switches},
                                   NUM("setup_ms"),
                                   NUM("cold_start_ms"),
                                   {"cpu_s", OBJECT, false, cpu},
                                   {"memory", OBJECT, false, memory},
                                   {"warmup", OBJECT, false, warmup},
                                   {"outliers", ARRAY, false, NULL},
                                   NUM("autocorrelation_lag1"),
                                   {"aa", OBJECT, false, aa},
                                   {"warnings", ARRAY, false, string_element},
                                   {"validity", OBJECT, true, validity},
                                   END};
static const struct field row_element[] = {{"", OBJECT, true, row}};

static const struct field workload[] = {
    {"workload", STRING, true, NULL}, STR("category"), STR("timestamp"), {"results", ARRAY, true, row_element}, END};
static const struct field experiment[] = {STR("device"),
                                          STR("dtype"),
                                          NUM("runs"),
                                          NUM("warmup_runs"),
                                          STR("tag"),
                                          STR("reference_baseline"),
                                          STR("blind_baseline"),
                                          STR("target_baseline"),
                                          END};
static const struct field build[] = {STR("version"), STR("commit"), STR("compiler"), STR("type"), END};
static const struct field processor[] = {STR("model"), END};
static const struct field manifest[] = {STR("host"),
                                        STR("kernel"),
                                        {"cpu", OBJECT, false, processor},
                                        {"build", OBJECT, false, build},
                                        NUM("launches"),
                                        NUM("profile_cost_us"),
                                        STR("arrivals"),
                                        STR("injury"),
                                        FLAG("complete"),
                                        END};
static const struct field document[] = {{"schema", STRING, true, NULL},
                                        STR("config"),
                                        STR("generated_at"),
                                        {"experiment", OBJECT, true, experiment},
                                        {"manifest", OBJECT, true, manifest},
                                        {"workload", OBJECT, true, workload},
                                        END};
static const struct field root[] = {{"", OBJECT, true, document}};

static const struct {
        const char *name;
        bool (*is)(const json *v);
} shapes[] = {
    [STRING] = {"a string", json_is_str},        [NUMBER] = {"a number", json_is_num},
    [BOOLEAN] = {"true or false", json_is_bool}, [OBJECT] = {"an object", json_is_object},
    [ARRAY] = {"an array", json_is_array},       [MAP] = {"an object", json_is_object},
};

static const char *found(const json *v)
{
        if (!v)
                return "nothing";
        if (json_is_null(v))
                return "null";
        for (size_t i = 0; i < ARRAY_LEN(shapes); i++)
                if (shapes[i].is(v))
                        return shapes[i].name;
        return "something else";
}

/* What a message quotes from the file, without what could move a terminal's cursor. */
static const char *plain(const char *s, char out[64])
{
        size_t n = 0;

        for (; s[n] && n < 63; n++)
                out[n] = s[n] >= 0x20 && s[n] < 0x7f ? s[n] : '?';
        out[n] = '\0';
        return out;
}

struct place {
        const char *name; /* of the document */
        char at[256];     /* "workload.results[3].wire" */
};

static int check_value(const json *v, const struct field *f, struct place *place);

/* Appends to the place; returns the length to cut it back to. */
static size_t enter(struct place *place, const char *key, size_t index)
{
        size_t len = strlen(place->at);
        char quoted[64];

        if (key)
                snprintf(place->at + len, sizeof(place->at) - len, "%s%s", len ? "." : "", plain(key, quoted));
        else
                snprintf(place->at + len, sizeof(place->at) - len, "[%zu]", index);
        return len;
}

static int check_members(const json *v, const struct field *inside, struct place *place)
{
        for (const struct field *f = inside; f->key; f++) {
                size_t len = enter(place, f->key, 0);
                int rc = check_value(json_get(v, f->key), f, place);

                if (rc < 0)
                        return rc;
                place->at[len] = '\0';
        }
        return 0;
}

static int check_elements(const json *v, const struct field *element, struct place *place)
{
        size_t index = 0;

        for (const json *e = json_first(v); e; e = json_next(e), index++) {
                size_t len = enter(place, json_key(e), index);
                int rc = check_value(e, element, place);

                if (rc < 0)
                        return rc;
                place->at[len] = '\0';
        }
        return 0;
}

static int check_value(const json *v, const struct field *f, struct place *place)
{
        if (json_is_null(v) && !f->required)
                return 0;
        if (!shapes[f->shape].is(v))
                return err_set(-EINVAL, "%s: %s: expected %s, found %s", place->name,
                               place->at[0] ? place->at : "document", shapes[f->shape].name, found(v));
        if (!f->inside)
                return 0;
        return f->shape == OBJECT ? check_members(v, f->inside, place) : check_elements(v, f->inside, place);
}

static int check_verdicts(const json *doc, const char *name)
{
        static const char *const known[] = {"VALID", "INVALID", "UNSTEADY", "FEW", "SKIPPED"};
        size_t index = 0;
        char quoted[64];

        for (const json *r = json_first(report_at(doc, "workload.results")); r; r = json_next(r), index++) {
                const char *verdict = json_str(report_at(r, "validity.verdict"), "");
                size_t i = 0;

                while (i < ARRAY_LEN(known) && strcmp(known[i], verdict) != 0)
                        i++;
                if (i == ARRAY_LEN(known))
                        return err_set(-EINVAL,
                                       "%s: workload.results[%zu].validity.verdict: expected VALID, INVALID, "
                                       "UNSTEADY, FEW or SKIPPED, found \"%s\"",
                                       name, index, plain(verdict, quoted));
        }
        return 0;
}

int report_check(const json *doc, const char *name)
{
        struct place place = {.name = name ? name : "result"};
        const char *schema = json_str(json_get(doc, "schema"), NULL);
        char quoted[64];

        /* First, because all other complaints about another kind of file would mislead. */
        if (schema && strcmp(schema, REPORT_SCHEMA) != 0)
                return err_set(-EINVAL, "%s: schema: expected \"%s\", found \"%s\"", place.name, REPORT_SCHEMA,
                               plain(schema, quoted));
        int rc = check_value(doc, root, &place);

        return rc < 0 ? rc : check_verdicts(doc, place.name);
}
