/* A small Ethernet switch in user space whose links lose, delay and throttle what crosses them.
 *
 *   relay SOCKET SEED NETNS...      port k (from 1) is the TAP device eth0 in the k-th network namespace
 *
 * A host's link has two lanes: UP, from the host to the switch, and DOWN. A frame takes the UP lane of its sender and the
 * DOWN lane of its receiver. Both throttle it; but only one of them, that of the link with the higher priority, judges
 * (drops) and delays it, so that a loss of 5 % on every link is a loss of 5 % between any two hosts and not of 9.75 %.
 * Only IPv4 is judged. Verdicts come from a generator of their own per lane: the n-th frame that a lane judges meets the same
 * fate in every run with the same seed. Jitter is uniform and never reorders the frames of a lane.
 *
 * SOCKET (SOCK_SEQPACKET) takes one command per packet and answers "ok", "error" or the counters; see command().
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <inttypes.h>
#include <net/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "lane.h"

#ifndef TUNSETCARRIER
#define TUNSETCARRIER _IOW('T', 226, int)
#endif

enum { MAX_PORTS = 64, FRAME_BYTES = 2048, MAX_WAITING = 1 << 15, REPLY_BYTES = 1 << 15, FIFO_PRIORITY = 10 };
struct port {
    int tap, priority, black_hole, no_carrier;
    struct lane lane[2];
};

struct frame {
    int64_t due_ns;
    uint64_t number;
    int to, length, throttled;
    unsigned char bytes[FRAME_BYTES];
};

static struct port ports[MAX_PORTS];
static int n_ports, lossy = 1;
static struct frame *waiting[MAX_WAITING], *spare[MAX_WAITING]; /* waiting: a heap, earliest first */
static int n_waiting, n_spare;
static uint64_t frame_number, oversized;

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int earlier(const struct frame *a, const struct frame *b) {
    return a->due_ns < b->due_ns || (a->due_ns == b->due_ns && a->number < b->number);
}

static void wait_in_heap(struct frame *f) {
    int i = n_waiting++;
    for (; i > 0 && earlier(f, waiting[(i - 1) / 2]); i = (i - 1) / 2) waiting[i] = waiting[(i - 1) / 2];
    waiting[i] = f;
}

static struct frame *earliest(void) {
    struct frame *first = waiting[0], *last = waiting[--n_waiting];
    int i = 0, child;
    while ((child = 2 * i + 1) < n_waiting) {
        if (child + 1 < n_waiting && earlier(waiting[child + 1], waiting[child])) child++;
        if (!earlier(waiting[child], last)) break;
        waiting[i] = waiting[child];
        i = child;
    }
    if (n_waiting) waiting[i] = last;
    return first;
}

static void deliver(int to, const unsigned char *bytes, int length) {
    struct lane *l = &ports[to].lane[DOWN];
    l->frames++;
    l->bytes += length;
    if (write(ports[to].tap, bytes, length) != length) l->overflow++;
}

/* The frame stands at the receiver's lane: deliver it, or let it wait there for its turn. */
static void arrive(struct frame *f, int64_t now) {
    if (!f->throttled) {
        f->throttled = 1;
        f->due_ns = throttle(&ports[f->to].lane[DOWN], f->due_ns, f->length);
        if (f->due_ns > now) {
            wait_in_heap(f);
            return;
        }
    }
    if (f->due_ns >= 0) deliver(f->to, f->bytes, f->length);
    spare[n_spare++] = f;
}

static int is_cut(const struct port *p) { return p->black_hole || p->no_carrier; }

static void forward(int from, int to, const unsigned char *bytes, int length, int64_t left_sender, int64_t now) {
    struct port *s = &ports[from], *r = &ports[to];
    struct lane *judge = s->priority > r->priority ? &s->lane[UP] : &r->lane[DOWN];
    if (is_cut(r)) {
        r->lane[DOWN].cut++;
        return;
    }
    if (lossy && bytes[12] == 0x08 && bytes[13] == 0x00 && (judge->loss_good > 0 || judge->loss_bad > 0) && is_lost(judge)) {
        judge->dropped++;
        return;
    }
    int64_t due = delay(judge, left_sender);
    if (due <= now && r->lane[DOWN].ns_per_byte == 0) {
        deliver(to, bytes, length);
        return;
    }
    if (n_waiting == MAX_WAITING || (n_spare == 0 && !(spare[n_spare++] = malloc(sizeof(struct frame))))) {
        judge->overflow++;
        return;
    }
    struct frame *f = spare[--n_spare];
    *f = (struct frame){.due_ns = due, .number = frame_number++, .to = to, .length = length};
    memcpy(f->bytes, bytes, length);
    if (due > now) wait_in_heap(f);
    else arrive(f, now);
}

/* One frame from a host. Hardware addresses end in the port's number. */
static void take(int from) {
    unsigned char bytes[FRAME_BYTES];
    struct port *s = &ports[from];
    int length = read(s->tap, bytes, sizeof bytes);
    if (length < 14) return;
    struct lane *up = &s->lane[UP];
    up->frames++;
    up->bytes += length;
    if (length > 1514) oversized++;
    if (is_cut(s)) {
        up->cut++;
        return;
    }
    int64_t now = now_ns(), left = throttle(up, now, length);
    if (left < 0) return;
    if (bytes[0] & 1) {
        for (int to = 0; to < n_ports; to++)
            if (to != from) forward(from, to, bytes, length, left, now);
    } else if (bytes[5] >= 1 && bytes[5] <= n_ports && bytes[5] - 1 != from)
        forward(from, bytes[5] - 1, bytes, length, left, now);
}

static int counters(char *reply) {
    struct timespec cpu;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &cpu);
    int n = sprintf(reply, "%.6f %" PRIu64 " %d\n", cpu.tv_sec + cpu.tv_nsec * 1e-9, oversized, sched_getscheduler(0));
    for (int p = 0; p < n_ports; p++)
        for (int d = UP; d <= DOWN; d++) {
            struct lane *l = &ports[p].lane[d];
            n += sprintf(reply + n, "%d %d %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 "\n",
                         p + 1, d, l->frames, l->bytes, l->judged, l->dropped, l->cut, l->overflow);
        }
    return n;
}

/* lane PORT DIRECTION LEAVE_GOOD LEAVE_BAD LOSS_GOOD LOSS_BAD DELAY_NS JITTER_NS NS_PER_BYTE
 * priority PORT N | black-hole PORT 0|1 | carrier PORT 0|1 | loss 0|1 | counters */
static int command(const char *text, char *reply) {
    int p, d, v;
    struct lane l;
    if (sscanf(text, "lane %d %d %lf %lf %lf %lf %" SCNd64 " %" SCNd64 " %lf", &p, &d, &l.leave_good, &l.leave_bad,
               &l.loss_good, &l.loss_bad, &l.delay_ns, &l.jitter_ns, &l.ns_per_byte) == 9 &&
        p >= 1 && p <= n_ports && (d == UP || d == DOWN)) {
        struct lane *to = &ports[p - 1].lane[d];
        to->leave_good = l.leave_good, to->leave_bad = l.leave_bad, to->loss_good = l.loss_good, to->loss_bad = l.loss_bad;
        to->delay_ns = l.delay_ns, to->jitter_ns = l.jitter_ns, to->ns_per_byte = l.ns_per_byte;
    } else if (sscanf(text, "priority %d %d", &p, &v) == 2 && p >= 1 && p <= n_ports) {
        ports[p - 1].priority = v;
    } else if (sscanf(text, "black-hole %d %d", &p, &v) == 2 && p >= 1 && p <= n_ports) {
        ports[p - 1].black_hole = v;
    } else if (sscanf(text, "carrier %d %d", &p, &v) == 2 && p >= 1 && p <= n_ports) {
        ports[p - 1].no_carrier = !v;
        if (ioctl(ports[p - 1].tap, TUNSETCARRIER, &v) < 0) return sprintf(reply, "error");
    } else if (sscanf(text, "loss %d", &v) == 1) {
        lossy = v;
    } else if (strcmp(text, "counters") == 0) {
        return counters(reply);
    } else
        return sprintf(reply, "error");
    return sprintf(reply, "ok");
}

/* Returns the client, or -1 when it has gone. */
static int answer(int client) {
    static char text[512], reply[REPLY_BYTES];
    int n = recv(client, text, sizeof text - 1, 0);
    if (n <= 0) {
        close(client);
        return -1;
    }
    text[n] = 0;
    n = command(text, reply);
    send(client, reply, n, MSG_NOSIGNAL);
    return client;
}

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static int open_tap(const char *netns) {
    struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI};
    strcpy(request.ifr_name, "eth0");
    int ns = open(netns, O_RDONLY | O_CLOEXEC);
    if (ns < 0 || setns(ns, CLONE_NEWNET) < 0) fail(netns);
    close(ns);
    int tap = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (tap < 0 || ioctl(tap, TUNSETIFF, &request) < 0) fail("/dev/net/tun");
    return tap;
}

int main(int argc, char **argv) {
    if (argc < 4 || argc - 3 > MAX_PORTS) return 2;
    uint64_t seed = strtoull(argv[2], NULL, 10);
    struct pollfd fds[MAX_PORTS + 2];
    for (; n_ports < argc - 3; n_ports++) {
        struct port *p = &ports[n_ports];
        p->tap = open_tap(argv[3 + n_ports]);
        for (int d = UP; d <= DOWN; d++) {
            uint64_t lane_seed = seed ^ (uint64_t)(2 * n_ports + d + 1) * 0xd1342543de82ef95ULL;
            draw(&lane_seed);
            p->lane[d].loss_random = lane_seed;
            p->lane[d].jitter_random = ~lane_seed;
        }
        fds[n_ports] = (struct pollfd){.fd = p->tap, .events = POLLIN};
    }
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strncpy(address.sun_path, argv[1], sizeof address.sun_path - 1);
    int listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) < 0 || listen(listener, 4) < 0)
        fail(argv[1]);
    struct pollfd *accepting = &fds[n_ports], *client = &fds[n_ports + 1];
    *accepting = (struct pollfd){.fd = listener, .events = POLLIN};
    *client = (struct pollfd){.fd = -1, .events = POLLIN};
    struct sched_param priority = {.sched_priority = FIFO_PRIORITY};
    sched_setscheduler(0, SCHED_FIFO, &priority); /* if permitted: keeps delays straight while the ranks compute */
    prctl(PR_SET_TIMERSLACK, 1UL, 0UL, 0UL, 0UL);
    mlockall(MCL_CURRENT | MCL_FUTURE);
    puts("ready");
    fflush(stdout);
    for (;;) {
        struct timespec left = {0, 0};
        if (n_waiting) {
            int64_t ns = waiting[0]->due_ns - now_ns();
            if (ns > 0) left = (struct timespec){.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000};
        }
        if (ppoll(fds, n_ports + 2, n_waiting ? &left : NULL, NULL) < 0) continue;
        if (n_waiting) {
            int64_t now = now_ns();
            while (n_waiting && waiting[0]->due_ns <= now) arrive(earliest(), now);
        }
        for (int i = 0; i < n_ports; i++)
            if (fds[i].revents & POLLIN) take(i);
        if (client->revents) client->fd = answer(client->fd);
        if (accepting->revents & POLLIN) {
            if (client->fd >= 0) close(client->fd);
            client->fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        }
    }
}
