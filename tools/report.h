/*
 * Overhead tables of stored results. A result is a JSON document as results/djinnbench.result.schema.json describes it;
 * it is untrusted: every field that a table reads is type-checked before anything is printed.
 */
#ifndef DJINN_TOOLS_REPORT_H
#define DJINN_TOOLS_REPORT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

#include "digest.h"
#include "json.h"

enum report_table { REPORT_TABLE_1, REPORT_TABLE_SAMPLE, REPORT_TABLE_FULL };
enum report_format { REPORT_MARKDOWN, REPORT_CSV, REPORT_JSON };

/* A result and the raw file that it came from. */
struct report_source {
        const json *doc;
        const char *name; /* path of the raw file; NULL: not from a file */
        bool hashed;      /* raw is the digest of the file's bytes */
        struct digest raw;
};

/* Reads, hashes, parses and checks a result file. 0, or -errno with a sentence that names the file and the field.
 * Strings and document are the source's; report_free releases them (and is harmless after a failure). */
int report_load(const char *path, struct report_source *out);
void report_free(struct report_source *source);

/* Checks that doc is a result of which every field that the tables read has its type. 0, or -EINVAL with a sentence
 * "NAME: field: expected ..., found ...". */
int report_check(const json *doc, const char *name);

/* Prints the table of n checked sources in their order. 0, or -errno with a sentence (no memory, cannot write). */
int report_write(FILE *out, const struct report_source *sources, size_t n, enum report_table table,
                 enum report_format format);

/* As report_write, of documents that are not files (yet); checks them first. */
int report_print(FILE *out, const json *const *docs, size_t n, enum report_table table, enum report_format format);

#endif
