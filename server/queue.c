#include "queue.h"

#include "check.h"

static struct queue_item *last_before(const struct queue *q, uint32_t run_class, uint64_t arrival_ns)
{
        struct queue_item *before = NULL;

        for (struct queue_item *i = q->first[run_class]; i && i->arrival_ns <= arrival_ns; i = i->next)
                before = i;
        return before;
}

void queue_put(struct queue *q, struct queue_item *item, uint32_t run_class)
{
        BUG_ON(run_class >= QUEUE_CLASSES);
        struct queue_item *before = q->last[run_class];

        if (before && before->arrival_ns > item->arrival_ns)
                before = last_before(q, run_class, item->arrival_ns);
        item->next = before ? before->next : q->first[run_class];
        item->run_class = run_class;
        if (before)
                before->next = item;
        else
                q->first[run_class] = item;
        if (!item->next)
                q->last[run_class] = item;
        q->count++;
}

static void unlink_after(struct queue *q, unsigned c, struct queue_item *before, struct queue_item *item)
{
        if (before)
                before->next = item->next;
        else
                q->first[c] = item->next;
        if (q->last[c] == item)
                q->last[c] = before;
        item->next = NULL;
        q->count--;
}

/* Class with what waiting has added. */
static uint64_t rank(const struct queue_item *item, uint64_t now_ns)
{
        uint64_t waited = now_ns > item->arrival_ns ? now_ns - item->arrival_ns : 0;

        return item->run_class + waited / QUEUE_AGE_NS;
}

static bool ahead(const struct queue_item *a, const struct queue_item *b, uint64_t now_ns)
{
        uint64_t ra = rank(a, now_ns), rb = rank(b, now_ns);

        return ra != rb ? ra > rb : a->arrival_ns < b->arrival_ns;
}

struct queue_item *queue_take(struct queue *q, uint64_t now_ns, bool (*ready)(const struct queue_item *))
{
        struct queue_item *best = NULL, *best_before = NULL;

        if (q->count == 0)
                return NULL;
        for (unsigned c = QUEUE_CLASSES; c-- > 0;) {
                struct queue_item *before = NULL, *item = q->first[c];

                /* Inside a class the first that is ready is the oldest, and so the one of the highest rank. */
                while (item && !ready(item)) {
                        before = item;
                        item = item->next;
                }
                if (!item || (best && !ahead(item, best, now_ns)))
                        continue;
                best = item;
                best_before = before;
        }
        if (best)
                unlink_after(q, best->run_class, best_before, best);
        return best;
}

static bool is_item(const struct queue_item *item, void *arg)
{
        return item == arg;
}

static void nothing(struct queue_item *item, void *arg)
{
}

bool queue_remove(struct queue *q, const struct queue_item *item)
{
        uint32_t before = q->count;

        queue_purge(q, is_item, nothing, (void *)item);
        return q->count < before;
}

void queue_purge(struct queue *q, bool (*pick)(const struct queue_item *, void *arg),
                 void (*drop)(struct queue_item *, void *arg), void *arg)
{
        for (unsigned c = 0; c < QUEUE_CLASSES; c++) {
                struct queue_item *before = NULL, *next;

                for (struct queue_item *item = q->first[c]; item; item = next) {
                        next = item->next;
                        if (!pick(item, arg)) {
                                before = item;
                                continue;
                        }
                        unlink_after(q, c, before, item);
                        drop(item, arg);
                }
        }
}

struct queue_item *queue_find(const struct queue *q, bool (*see)(const struct queue_item *, void *arg), void *arg)
{
        for (unsigned c = 0; c < QUEUE_CLASSES; c++) {
                for (struct queue_item *item = q->first[c]; item; item = item->next) {
                        if (see(item, arg))
                                return item;
                }
        }
        return NULL;
}
