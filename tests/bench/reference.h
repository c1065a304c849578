/* What the two halves of the reference share: reference.c does the work, reference_scene.c makes the connections. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <linux/filter.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CHUNK (256 * 1024)        /* write queues in pieces: a large one can exhaust the socket's memory */
enum { ESTABLISHED = 1, OPTION_WINDOW = 3, OPTION_SACK = 4, OPTION_TIMESTAMP = 8 };  /* include/net/tcp.h */

struct record {
    struct sockaddr_in local, remote;
    struct tcp_repair_window window;
    uint32_t write_seq, rcv_nxt, timestamp;
    uint32_t sent, unsent, received;  /* bytes; the queues lie one after the other at data */
    int mss_clamp, sndbuf, rcvbuf;
    uint8_t state, options, snd_wscale, rcv_wscale;
    unsigned char *data;
    int socket_options[16];
};

struct configuration {
    int n, rounds, batch, warm, receive, unacked, unsent;
    bool move, no_probe, release, options, peers, paced;
};

extern struct configuration cfg;
extern int *sock;                 /* the server's ends */
extern struct record *record;

/* reference_scene.c: the peers and their hosts */
_Noreturn void peers(int control, const struct sockaddr_in *server);
void tell(char letter);           /* to the peers, and wait until it is done */
void make_scene(int control, pid_t child);
void enter(int host);             /* 0 or 1, with --move */
void accept_all(int listener);
void queue_data(size_t room);
void check(void);

_Noreturn void die(const char *format, ...);

#define MUST(call) ({ long result_ = (long)(call); if (result_ < 0) die("%s (line %d)", #call, __LINE__); result_; })

static inline double seconds(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static inline double now(void) { return seconds(CLOCK_MONOTONIC); }

static inline void set(int fd, int level, int name, int value) {
    if (setsockopt(fd, level, name, &value, sizeof value) < 0) die("setsockopt %d/%d = %d", level, name, value);
}

static inline int get(int fd, int level, int name) {
    int value = 0;
    socklen_t length = sizeof value;
    if (getsockopt(fd, level, name, &value, &length) < 0) die("getsockopt %d/%d", level, name);
    return value;
}

/* Byte number `offset` of the stream that belongs to the peer's port: what is lost or doubled shows. */
static inline unsigned char pattern(int port, size_t offset) { return offset * 131 + (offset >> 8) * 29 + port * 7; }

static inline void fill(unsigned char *data, int port, size_t offset, size_t length) {
    for (size_t i = 0; i < length; i++) data[i] = pattern(port, offset + i);
}

static inline void verify(const unsigned char *data, int port, size_t offset, size_t length) {
    for (size_t i = 0; i < length; i++)
        if (data[i] != pattern(port, offset + i)) {
            errno = EBADMSG;
            die("port %d: byte %zu is wrong", port, offset + i);
        }
}

static inline void put(int fd, const unsigned char *data, size_t length) {
    while (length) {
        ssize_t done = MUST(send(fd, data, length < CHUNK ? length : CHUNK, 0));
        data += done;
        length -= done;
    }
}

static inline int queue_bytes(void) { return cfg.receive + cfg.unacked + cfg.unsent; }
