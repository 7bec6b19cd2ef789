/* One direction of one host's link: what it loses, delays and throttles. Times in ns. */
#pragma once
#include <stdint.h>

enum { UP, DOWN };
#define QUEUE_NS 50000000 /* a lane's queue holds what its rate carries in 50 ms */

struct lane {
    double leave_good, leave_bad, loss_good, loss_bad; /* Gilbert-Elliott: chances per frame */
    int64_t delay_ns, jitter_ns;
    double ns_per_byte; /* 0: no limit */
    int is_bad;
    uint64_t loss_random, jitter_random;
    int64_t idle_at_ns, last_due_ns;
    uint64_t frames, bytes, judged, dropped, cut, overflow;
};

/* splitmix64, as a number in [0, 1) */
static double draw(uint64_t *state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15ULL;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ z >> 27) * 0x94d049bb133111ebULL;
    return (double)((z ^ z >> 31) >> 11) * 0x1p-53;
}

/* When the last bit of a frame that arrives at `at` has left the lane; -1 if its queue is full. */
static int64_t throttle(struct lane *l, int64_t at, int length) {
    if (l->ns_per_byte == 0) return at;
    int64_t begin = l->idle_at_ns > at ? l->idle_at_ns : at;
    if (begin - at > QUEUE_NS) {
        l->overflow++;
        return -1;
    }
    return l->idle_at_ns = begin + (int64_t)(length * l->ns_per_byte);
}

static int is_lost(struct lane *l) {
    double change = draw(&l->loss_random), verdict = draw(&l->loss_random);
    if (change < (l->is_bad ? l->leave_bad : l->leave_good)) l->is_bad = !l->is_bad;
    l->judged++;
    return verdict < (l->is_bad ? l->loss_bad : l->loss_good);
}

static int64_t delay(struct lane *l, int64_t at) {
    int64_t due = at + l->delay_ns;
    if (l->jitter_ns) due += (int64_t)((2 * draw(&l->jitter_random) - 1) * l->jitter_ns);
    if (due < l->last_due_ns) due = l->last_due_ns;
    return l->last_due_ns = due;
}
