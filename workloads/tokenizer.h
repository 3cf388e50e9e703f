/*
 * tokenizer.json (Hugging Face): byte-level BPE (GPT-2) in this version; other kinds are refused with their name. The
 * file is untrusted. Pre-tokenisation by PCRE2 with Unicode properties.
 */
#ifndef DJINN_WORKLOADS_TOKENIZER_H
#define DJINN_WORKLOADS_TOKENIZER_H

#include <stddef.h>
#include <stdint.h>

struct tokenizer;
/* dir_fd: the model's folder. -ENOENT: no tokenizer.json; -ENOTSUP: a kind that this version does not know. */
int tokenizer_open(int dir_fd, const char *name, struct tokenizer **out);
void tokenizer_close(struct tokenizer *t);
/* ids of text without special tokens; *ids is malloc'd. */
int tokenizer_encode(const struct tokenizer *t, const char *text, size_t len, int32_t **ids, size_t *n);
size_t tokenizer_vocab(const struct tokenizer *t);

#endif
