/*
 * The proof that a row does the same job (SPEC 3): a reference computed here, without any server, and its comparison with
 * what a baseline returns when it is forced along the reference's tokens.
 */
#ifndef DJINN_CLIENT_SAME_JOB_H
#define DJINN_CLIENT_SAME_JOB_H

#include "exec.h"
#include "workload.h"

struct reference {
        const char *device; /* "reference" (plain C), or "cpu" where that would take too long */
        uint32_t turns, steps, batch, vocab;
        int32_t *tokens;    /* [turns][steps][batch]: the greedy choice */
        float *logits;      /* [turns][steps][batch][vocab]: of the last position of every step */
        size_t output_len;  /* feed-forward: bytes */
        void *output_bytes; /* feed-forward: the output, in its dtype (integers are compared exactly) */
        bool token_sensitive, state_sensitive; /* one altered id, a forgotten history change the tokens */
        struct digest weights;
};

/* The application's conversation: ids of all turns, laid out for the largest history. */
struct conversation {
        uint32_t batch, cap; /* sequences; ids per sequence */
        int32_t *ids;        /* [batch][cap] */
        void *input;         /* feed-forward */
        size_t input_len;
};

uint32_t workload_turns(const struct workload *w);
/* History length at turn k, and how much of it the state covers when state stays on the server. */
struct plan_shape workload_shape(const struct workload *w, uint32_t turn, bool state_stays, bool check);

int conversation_new(const struct workload *w, struct conversation *c);
void conversation_free(struct conversation *c);
/* Prompt (and all later turns' new ids are added by conversation_turn) or input of this block. */
int conversation_start(struct conversation *c, const struct workload *w, uint64_t seed, uint32_t block);
/* After turn k - 1 gave `tokens` [steps][batch]: appends them and the new ids of turn k. */
void conversation_turn(struct conversation *c, const struct workload *w, uint64_t seed, uint32_t block, uint32_t turn,
                       const int32_t *tokens);

/* Runs block 0's conversation on a device of this process. */
int reference_make(const struct workload *w, const struct weights_source *src, uint64_t seed, struct reference *out);
void reference_free(struct reference *ref);

struct check_result {
        bool done, passed;
        double max_rel_l2, tolerance;
        bool argmax_equal;
        int64_t near_tie; /* first step whose choice is within rounding; -1 none */
        bool digest_sensitive;
        char why[200]; /* when it did not pass */
};

double check_tolerance(enum op_dtype dtype);
/* Compares logits of one turn ([steps][batch][vocab]); accumulates into *c. */
void check_logits(const struct reference *ref, uint32_t turn, const float *logits, double tolerance,
                  struct check_result *c);
/* Tokens that a run of block 0 chose for itself ([steps][batch] of one turn), against the reference's: equal up to the first
 * near tie, behind which another choice is rounding. Logits were checked before. */
void check_tokens(const struct reference *ref, uint32_t turn, const int32_t *tokens, struct check_result *c);
void check_output(const struct reference *ref, const struct workload *w, const void *output, size_t len,
                  double tolerance, struct check_result *c);

#endif
