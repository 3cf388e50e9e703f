/* The flattened form that the experiment's README shows: an array with, per result, {workload, category, results[]},
 * and per row the baseline and its aggregates; with ours beside them. Raw samples stay in the raw file. Only fields whose
 * types were checked are copied, and the JSON writer escapes them. */
#include "report_inside.h"

#include <errno.h>
#include <stdlib.h>

#include "check.h"
#include "err.h"

static json *flat_row(const json *row)
{
        static const char *const keys[] = {"baseline",   "runner_type", "transport", "path",          "emulated",
                                           "aggregates", "derived",     "ci",        "decomposition", "breakdown",
                                           "wire",       "work",        "roofline",  "weights",       "validity"};
        json *flat = json_object();

        for (size_t i = 0; i < ARRAY_LEN(keys); i++) {
                const json *v = json_get(row, keys[i]);

                json_set(flat, keys[i], v ? json_copy(v) : json_of_null());
        }
        return flat;
}

static json *flat_source(const struct report_source *source)
{
        const json *workload = json_get(source->doc, "workload");
        json *flat = json_object(), *results = json_array();
        char hash[33];

        json_set_str(flat, "workload", json_str(json_get(workload, "workload"), NULL));
        json_set_str(flat, "category", json_str(json_get(workload, "category"), NULL));
        json_set_str(flat, "timestamp", json_str(json_get(workload, "timestamp"), NULL));
        json_set_str(flat, "commit", json_str(report_at(source->doc, "manifest.build.commit"), NULL));
        json_set_str(flat, "source_file", source->name);
        if (source->hashed)
                digest_hex(source->raw, hash);
        json_set_str(flat, "source_xxh3_128", source->hashed ? hash : NULL);
        for (const json *r = json_first(json_get(workload, "results")); r; r = json_next(r))
                json_push(results, flat_row(r));
        json_set(flat, "results", results);
        return flat;
}

int report_json(FILE *out, const struct report_view *view)
{
        json *all = json_array();

        for (size_t i = 0; i < view->nsources; i++)
                json_push(all, flat_source(&view->sources[i]));
        char *text = json_text(all, true);

        json_free(all);
        if (!text)
                return err_set(-ENOMEM, "report: no memory for the JSON text");
        fprintf(out, "%s\n", text);
        free(text);
        return 0;
}
