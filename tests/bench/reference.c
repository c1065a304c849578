/* The reference of the bench: the fewest system calls that save and restore TCP connections correctly.
 *
 * Straight line, no allocation on the way, buffers reused: what the kernel makes everybody pay. N connections go
 * through four phases, each over all N (or --batch B) before the next, and each timed as a whole:
 *
 *   save     freeze (TCP_REPAIR) and copy the state and the queues to memory
 *   close    let go of the source without a packet: close() in repair mode, or with --release connect(AF_UNSPEC)
 *   restore  rebuild, still silent
 *   resume   leave repair mode, with the kernel's window probe (or --no-probe), and send what was unsent
 *
 * The peers live in a child process, so that 10,000 connections fit under a limit of 20,000 descriptors. Afterwards
 * each connection must deliver what was queued, byte for byte, and echo. What it does not save: socket options
 * (--options adds the common ones), FIN states, urgent data, IPv6.
 *
 * Needs CAP_NET_ADMIN. Build: gcc -O2 -o reference reference.c
 */
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

#define PEER_BUFFER 16384         /* SO_RCVBUF of a peer that is to shut its window */
#define QUIET 250000              /* microseconds: longer than a delayed ACK (200 ms), which would draw a RST */
#define CHUNK (256 * 1024)        /* write queues in pieces: a large one can exhaust the socket's memory */
#define PATIENCE 30.0             /* seconds until a check gives up */
#define LINUX_SIOCINQ 0x541B
#define LINUX_SIOCOUTQ 0x5411
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

enum phase { SAVE, CLOSE, RESTORE, RESUME, PHASES };
struct cost { double wall, cpu; };  /* microseconds a connection */
static const char *const phase_name[PHASES] = {"save", "close", "restore", "resume"};

/* The socket options that a restored program would miss first; read in save, set in resume where not default (0). */
static const struct { int level, name; } common_options[] = {
    {IPPROTO_TCP, TCP_NODELAY}, {SOL_SOCKET, SO_KEEPALIVE}, {SOL_SOCKET, SO_BUF_LOCK}, {SOL_SOCKET, SO_PRIORITY},
    {SOL_SOCKET, SO_MARK}, {SOL_SOCKET, SO_REUSEADDR}, {IPPROTO_TCP, TCP_CORK}, {IPPROTO_TCP, TCP_USER_TIMEOUT},
};
#define COMMON_OPTIONS (sizeof common_options / sizeof *common_options)

static struct {
    int n, rounds, batch, receive, unacked, unsent;
    bool move, no_probe, release, options, peers;
} cfg = {.n = 1000, .rounds = 1};

static int *sock;                 /* the server's ends */
static struct record *record;
static uint64_t *streamed;        /* bytes ever sent to each peer; goes to them with the command to read */
static int command;               /* the server's end of the pipe to the peers */
static int host_a = -1, host_b = -1;

static _Noreturn void die(const char *format, ...) {
    int saved = errno;
    va_list arguments;
    va_start(arguments, format);
    fputs("reference: ", stderr);
    vfprintf(stderr, format, arguments);
    fprintf(stderr, ": %s\n", strerror(saved));
    exit(1);
}

#define MUST(call) ({ long result_ = (long)(call); if (result_ < 0) die("%s (line %d)", #call, __LINE__); result_; })

static double seconds(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static double now(void) { return seconds(CLOCK_MONOTONIC); }

static void set(int fd, int level, int name, int value) {
    if (setsockopt(fd, level, name, &value, sizeof value) < 0) die("setsockopt %d/%d = %d", level, name, value);
}

static int get(int fd, int level, int name) {
    int value = 0;
    socklen_t length = sizeof value;
    if (getsockopt(fd, level, name, &value, &length) < 0) die("getsockopt %d/%d", level, name);
    return value;
}

/* Byte number `offset` of the stream that belongs to the peer's port: what is lost or doubled shows. */
static unsigned char pattern(int port, size_t offset) { return offset * 131 + (offset >> 8) * 29 + port * 7; }

static void fill(unsigned char *data, int port, size_t offset, size_t length) {
    for (size_t i = 0; i < length; i++) data[i] = pattern(port, offset + i);
}

static void verify(const unsigned char *data, int port, size_t offset, size_t length) {
    for (size_t i = 0; i < length; i++)
        if (data[i] != pattern(port, offset + i)) {
            errno = EBADMSG;
            die("port %d: byte %zu is wrong", port, offset + i);
        }
}

/* ---- the four phases ------------------------------------------------------------------------------------------ */

static uint32_t peek(int fd, unsigned char *data, size_t room) {
    ssize_t length = recv(fd, data, room, MSG_PEEK | MSG_DONTWAIT);
    if (length < 0 && errno == EAGAIN) return 0;
    if (length < 0 || (size_t)length == room) die("peek: %zd of at most %zu", length, room - 1);
    return length;
}

static void save(int fd, struct record *r, size_t room) {
    struct tcp_info info;
    uint32_t memory[9];           /* SO_MEMINFO: receive, rcvbuf, transmit, sndbuf, forward, queued, ... */
    socklen_t length;

    set(fd, IPPROTO_TCP, TCP_REPAIR, TCP_REPAIR_ON);
    length = sizeof r->local;
    MUST(getsockname(fd, (struct sockaddr *)&r->local, &length));
    length = sizeof r->remote;
    MUST(getpeername(fd, (struct sockaddr *)&r->remote, &length));
    length = sizeof info;
    MUST(getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &length));
    length = sizeof memory;
    MUST(getsockopt(fd, SOL_SOCKET, SO_MEMINFO, memory, &length));
    length = sizeof r->window;
    MUST(getsockopt(fd, IPPROTO_TCP, TCP_REPAIR_WINDOW, &r->window, &length));
    r->state = info.tcpi_state;
    r->options = info.tcpi_options;
    r->snd_wscale = info.tcpi_snd_wscale;
    r->rcv_wscale = info.tcpi_rcv_wscale;
    r->rcvbuf = memory[1];
    r->sndbuf = memory[3];
    r->mss_clamp = get(fd, IPPROTO_TCP, TCP_MAXSEG);
    r->timestamp = r->options & TCPI_OPT_TIMESTAMPS ? get(fd, IPPROTO_TCP, TCP_TIMESTAMP) : 0;
    if (memory[0] | memory[5]) set(fd, SOL_SOCKET, SO_PEEK_OFF, -1);
    set(fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, TCP_SEND_QUEUE);
    r->write_seq = get(fd, IPPROTO_TCP, TCP_QUEUE_SEQ);
    r->sent = memory[5] ? peek(fd, r->data, room) : 0;
    r->unsent = r->sent ? info.tcpi_notsent_bytes : 0;
    r->sent -= r->unsent;
    set(fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, TCP_RECV_QUEUE);
    r->rcv_nxt = get(fd, IPPROTO_TCP, TCP_QUEUE_SEQ);
    r->received = memory[0] ? peek(fd, r->data + r->sent + r->unsent, room - r->sent - r->unsent) : 0;
    set(fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, TCP_NO_QUEUE);  /* or the application's write() would enter the queue */
    if (cfg.options)
        for (size_t i = 0; i < COMMON_OPTIONS; i++)
            r->socket_options[i] = get(fd, common_options[i].level, common_options[i].name);
}

static void let_go(int fd) {
    if (!cfg.release) {
        MUST(close(fd));
        return;
    }
    struct sockaddr unspecified = {.sa_family = AF_UNSPEC};
    MUST(connect(fd, &unspecified, sizeof unspecified));
    set(fd, IPPROTO_TCP, TCP_REPAIR, TCP_REPAIR_OFF_NO_WP);
}

static void put(int fd, const unsigned char *data, size_t length) {
    while (length) {
        ssize_t done = MUST(send(fd, data, length < CHUNK ? length : CHUNK, 0));
        data += done;
        length -= done;
    }
}

static int restore(const struct record *r) {
    struct tcp_repair_opt option[3];
    int options = 0;
    int fd = MUST(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, IPPROTO_TCP));

    set(fd, IPPROTO_TCP, TCP_REPAIR, TCP_REPAIR_ON);
    if (r->sent | r->unsent) set(fd, SOL_SOCKET, SO_SNDBUFFORCE, r->sndbuf / 2);  /* the kernel doubles it */
    if (r->received) set(fd, SOL_SOCKET, SO_RCVBUFFORCE, r->rcvbuf / 2);
    set(fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, TCP_SEND_QUEUE);
    set(fd, IPPROTO_TCP, TCP_QUEUE_SEQ, r->write_seq - r->sent - r->unsent);
    set(fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, TCP_RECV_QUEUE);
    set(fd, IPPROTO_TCP, TCP_QUEUE_SEQ, r->rcv_nxt - r->received);
    set(fd, IPPROTO_TCP, TCP_MAXSEG, r->mss_clamp);  /* before connect, or segments stay at 524 bytes */
    MUST(bind(fd, (const struct sockaddr *)&r->local, sizeof r->local));
    MUST(connect(fd, (const struct sockaddr *)&r->remote, sizeof r->remote));
    if (r->options & TCPI_OPT_TIMESTAMPS) option[options++] = (struct tcp_repair_opt){OPTION_TIMESTAMP, 0};
    if (r->options & TCPI_OPT_SACK) option[options++] = (struct tcp_repair_opt){OPTION_SACK, 0};
    if (r->options & TCPI_OPT_WSCALE)
        option[options++] = (struct tcp_repair_opt){OPTION_WINDOW, r->snd_wscale | r->rcv_wscale << 16};
    if (options) MUST(setsockopt(fd, IPPROTO_TCP, TCP_REPAIR_OPTIONS, option, options * sizeof *option));
    if (r->options & TCPI_OPT_TIMESTAMPS) set(fd, IPPROTO_TCP, TCP_TIMESTAMP, r->timestamp);
    put(fd, r->data + r->sent + r->unsent, r->received);  /* the receive queue is still selected */
    if (r->sent) {
        set(fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, TCP_SEND_QUEUE);
        put(fd, r->data, r->sent);
    }
    MUST(setsockopt(fd, IPPROTO_TCP, TCP_REPAIR_WINDOW, &r->window, sizeof r->window));
    return fd;
}

static void resume(int fd, const struct record *r) {
    set(fd, IPPROTO_TCP, TCP_REPAIR, cfg.no_probe ? TCP_REPAIR_OFF_NO_WP : TCP_REPAIR_OFF);
    put(fd, r->data + r->sent, r->unsent);
    if (r->sent | r->unsent | r->received) set(fd, SOL_SOCKET, SO_BUF_LOCK, 0);  /* autotune again */
    if (cfg.options)
        for (size_t i = 0; i < COMMON_OPTIONS; i++)
            if (r->socket_options[i]) set(fd, common_options[i].level, common_options[i].name, r->socket_options[i]);
}

/* ---- the peers: a child process that obeys one-letter commands ------------------------------------------------ */

static int peer_port(int fd) {
    struct sockaddr_in name;
    socklen_t length = sizeof name;
    MUST(getsockname(fd, (struct sockaddr *)&name, &length));
    return ntohs(name.sin_port);
}

static void peers_connect(int *peer, const struct sockaddr_in *server) {
    for (int i = 0; i < cfg.n; i++) {
        peer[i] = MUST(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, IPPROTO_TCP));
        if (cfg.unsent) set(peer[i], SOL_SOCKET, SO_RCVBUF, PEER_BUFFER);
        MUST(connect(peer[i], (const struct sockaddr *)server, sizeof *server));
    }
}

/* A peer that does not see what arrives leaves it unacknowledged: a socket filter that drops everything. */
static void peers_deaf(const int *peer, bool deaf) {
    struct sock_filter drop = BPF_STMT(BPF_RET | BPF_K, 0);
    struct sock_fprog program = {1, &drop};
    for (int i = 0; i < cfg.n; i++)
        MUST(setsockopt(peer[i], SOL_SOCKET, deaf ? SO_ATTACH_FILTER : SO_DETACH_FILTER, &program, sizeof program));
}

static void peers_write(const int *peer) {
    unsigned char *data = malloc(cfg.receive);
    for (int i = 0; i < cfg.n; i++) {
        fill(data, peer_port(peer[i]), 0, cfg.receive);
        put(peer[i], data, cfg.receive);
    }
    free(data);
}

/* Read up to streamed[i] bytes everywhere, in sweeps, verify them, then answer with one byte. */
static void peers_read(const int *peer, size_t *seen) {
    unsigned char data[65536];
    double deadline = now() + PATIENCE;
    for (int i = 0; i < cfg.n && cfg.unsent; i++) set(peer[i], SOL_SOCKET, SO_RCVBUF, 1 << 20);
    for (int missing = cfg.n; missing;) {
        bool progress = false;
        missing = 0;
        for (int i = 0; i < cfg.n; i++) {
            if (seen[i] >= streamed[i]) continue;
            ssize_t length = recv(peer[i], data, sizeof data, MSG_DONTWAIT);
            if (length == 0 || (length < 0 && errno != EAGAIN)) die("peer %d at byte %zu", i, seen[i]);
            if (length > 0) {
                verify(data, peer_port(peer[i]), seen[i], length);
                seen[i] += length;
                progress = true;
                if (seen[i] == streamed[i]) MUST(send(peer[i], data, 1, 0));
            }
            missing += seen[i] < streamed[i];
        }
        if (!progress) usleep(500);
        if (now() > deadline) {
            errno = ETIMEDOUT;
            die("%d peers did not receive all", missing);
        }
    }
}

static void receive_streamed(int control) {
    size_t wanted = cfg.n * sizeof *streamed;
    for (size_t have = 0; have < wanted;) {
        ssize_t length = MUST(read(control, (char *)streamed + have, wanted - have));
        if (!length) exit(0);
        have += length;
    }
}

static _Noreturn void peers(int control, const struct sockaddr_in *server) {
    int *peer = calloc(cfg.n, sizeof *peer);
    size_t *seen = calloc(cfg.n, sizeof *seen);
    char letter;
    while (read(control, &letter, 1) == 1) {
        switch (letter) {
        case 'n': MUST(unshare(CLONE_NEWNET)); break;
        case 'c': peers_connect(peer, server); break;
        case 'd': peers_deaf(peer, true); break;
        case 'h': peers_deaf(peer, false); break;
        case 'w': peers_write(peer); break;
        case 'r': receive_streamed(control), peers_read(peer, seen); break;
        case 'a': MUST(system("ip route replace 10.255.0.1 dev a")); break;
        case 'b': MUST(system("ip route replace 10.255.0.1 dev b")); break;
        }
        MUST(write(control, &letter, 1));
    }
    exit(0);
}

static void begin(char letter) { MUST(write(command, &letter, 1)); }

static void finish(char letter) {
    char answer = 0;
    if (read(command, &answer, 1) != 1 || answer != letter) {
        errno = ECHILD;
        die("the peers failed at '%c'", letter);
    }
}

static void tell(char letter) {
    begin(letter);
    finish(letter);
}

/* ---- set-up and check ----------------------------------------------------------------------------------------- */

/* Two hosts that carry the same address and a host of peers that has a wire to each of them. */
static void make_hosts(pid_t child) {
    char text[512];
    tell('n');
    for (char wire = 'a'; wire <= 'b'; wire++) {
        MUST(unshare(CLONE_NEWNET));
        snprintf(text, sizeof text,
                 "ip link set lo up && ip link add name eth0 type veth peer name %c netns %d && ip link set eth0 up && "
                 "ip addr add 10.255.0.1/24 dev eth0 && nsenter -t %d -n sh -c 'ip link set lo up && "
                 "ip link set dev %c up && ip addr add 10.255.0.9/32 dev %c'", wire, child, child, wire, wire);
        if (system(text)) die("cannot make host %c", wire);
        *(wire == 'a' ? &host_a : &host_b) = MUST(open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC));
    }
}

static void enter(int host) {
    if (cfg.move) MUST(setns(host, CLONE_NEWNET));
}

static void accept_all(int listener) {
    begin('c');
    for (int i = 0; i < cfg.n; i++) sock[i] = MUST(accept4(listener, NULL, NULL, SOCK_CLOEXEC));
    finish('c');
}

static int port_of(int i) { return ntohs(record[i].remote.sin_port); }

/* Write to every peer until exactly `bytes` stay in the send queue and no window probe brings a byte across. */
static void fill_send_queues(int bytes) {
    unsigned char *data = malloc(bytes);
    double deadline = now() + PATIENCE;
    for (int settled = 0; settled < 3;) {
        bool written = false;
        for (int i = 0; i < cfg.n; i++) {
            int queued;
            MUST(ioctl(sock[i], LINUX_SIOCOUTQ, &queued));
            if (queued >= bytes) continue;
            fill(data, port_of(i), streamed[i], bytes - queued);
            ssize_t done = send(sock[i], data, bytes - queued, MSG_DONTWAIT);
            if (done > 0) streamed[i] += done;
            else if (errno != EAGAIN) die("fill the send queue");
            written = true;
        }
        settled = written ? 0 : settled + 1;
        usleep(QUIET);
        if (now() > deadline) die("the send queues do not settle at %d bytes", bytes);
    }
    free(data);
}

static int queue_bytes(void) { return cfg.receive + cfg.unacked + cfg.unsent; }

static void queue_data(size_t room) {
    for (int i = 0; i < cfg.n; i++) {
        socklen_t length = sizeof record[i].remote;
        MUST(getpeername(sock[i], (struct sockaddr *)&record[i].remote, &length));
        record[i].data = (unsigned char *)(record + cfg.n) + i * room;
        if (cfg.unacked | cfg.unsent) set(sock[i], SOL_SOCKET, SO_SNDBUF, 4 * (cfg.unacked + cfg.unsent));
    }
    if (cfg.receive) tell('w');
    for (int i = 0, queued = 0; i < cfg.n && cfg.receive; i += queued == cfg.receive)
        MUST(ioctl(sock[i], LINUX_SIOCINQ, &queued));
    if (cfg.unacked) tell('d');
    if (cfg.unacked | cfg.unsent) fill_send_queues(cfg.unacked | cfg.unsent);
    if (queue_bytes()) usleep(QUIET);
}

/* Every connection delivers what was queued and one byte more, and the peer's answer arrives. */
static void check(void) {
    unsigned char *data = malloc(cfg.receive + 1);
    if (cfg.unacked) tell('h');
    for (int i = 0; i < cfg.n; i++) {
        fill(data, port_of(i), streamed[i]++, 1);
        MUST(send(sock[i], data, 1, 0));
    }
    begin('r');
    put(command, (unsigned char *)streamed, cfg.n * sizeof *streamed);
    finish('r');
    for (int i = 0; i < cfg.n; i++) {
        size_t expected = cfg.receive + 1;
        for (size_t have = 0; have < expected;) {
            ssize_t length = MUST(recv(sock[i], data + have, expected - have, 0));
            if (!length) die("connection %d ended", i);
            have += length;
        }
        verify(data, port_of(i), 0, cfg.receive);
    }
    free(data);
}

static void start(struct cost *cost) {
    cost->wall -= seconds(CLOCK_MONOTONIC) * 1e6 / cfg.n;
    cost->cpu -= seconds(CLOCK_THREAD_CPUTIME_ID) * 1e6 / cfg.n;
}

static void stop(struct cost *cost) {
    cost->cpu += seconds(CLOCK_THREAD_CPUTIME_ID) * 1e6 / cfg.n;
    cost->wall += seconds(CLOCK_MONOTONIC) * 1e6 / cfg.n;
}

static void run_batch(struct cost *cost, int from, int to, size_t room) {
    start(&cost[SAVE]);
    for (int i = from; i < to; i++) save(sock[i], &record[i], room);
    stop(&cost[SAVE]);

    start(&cost[CLOSE]);
    for (int i = from; i < to; i++) let_go(sock[i]);
    stop(&cost[CLOSE]);
    for (int i = from; i < to && cfg.release; i++) MUST(close(sock[i]));  /* the application's, not counted */

    enter(host_b);
    start(&cost[RESTORE]);
    for (int i = from; i < to; i++) sock[i] = restore(&record[i]);
    stop(&cost[RESTORE]);
    if (cfg.move) tell('b');

    start(&cost[RESUME]);
    for (int i = from; i < to; i++) resume(sock[i], &record[i]);
    stop(&cost[RESUME]);
}

static void run_round(struct cost *cost, size_t room) {
    for (int from = 0; from < cfg.n; from += cfg.batch)
        run_batch(cost, from, from + cfg.batch < cfg.n ? from + cfg.batch : cfg.n, room);
    for (int i = 0; i < cfg.n; i++)
        if (record[i].state != ESTABLISHED || (int)record[i].received != cfg.receive ||
            (int)(record[i].sent + record[i].unsent) != (cfg.unacked | cfg.unsent)) {
            errno = EPROTO;
            die("connection %d was saved with state %d and %u + %u + %u bytes queued", i, record[i].state,
                record[i].sent, record[i].unsent, record[i].received);
        }
}

static void report(struct cost (*round)[PHASES]) {
    printf("{\"v\": 1, \"connections\": %d, \"sent\": %u, \"unsent\": %u, \"received\": %u, \"mss_clamp\": %d, "
           "\"rounds\": [", cfg.n, record[0].sent, record[0].unsent, record[0].received, record[0].mss_clamp);
    for (int i = 0; i < cfg.rounds; i++) {
        struct cost sum = {0};
        printf(i ? ", {" : "{");
        for (int p = 0; p < PHASES; p++) {
            printf("\"%s\": %.3f, ", phase_name[p], round[i][p].wall);
            sum.wall += round[i][p].wall;
            sum.cpu += round[i][p].cpu;
        }
        printf("\"sum\": %.3f, \"cpu\": %.3f}", sum.wall, sum.cpu);
    }
    puts("]}");
}

static const struct option long_options[] = {
    {"connections", required_argument, NULL, 'n'}, {"rounds", required_argument, NULL, 'k'},
    {"receive", required_argument, NULL, 'r'},     {"unacked", required_argument, NULL, 'u'},
    {"unsent", required_argument, NULL, 's'},      {"no-probe", no_argument, NULL, 'p'},
    {"release", no_argument, NULL, 'l'},           {"options", no_argument, NULL, 'o'},
    {"move", no_argument, NULL, 'm'},              {"peers", no_argument, NULL, 'P'},
    {"batch", required_argument, NULL, 'b'},       {NULL, 0, NULL, 0},
};

static void parse(int argc, char **argv) {
    for (int letter; (letter = getopt_long(argc, argv, "", long_options, NULL)) != -1;) {
        switch (letter) {
        case 'n': cfg.n = atoi(optarg); break;
        case 'k': cfg.rounds = atoi(optarg); break;
        case 'b': cfg.batch = atoi(optarg); break;
        case 'r': cfg.receive = atoi(optarg); break;
        case 'u': cfg.unacked = atoi(optarg); break;
        case 's': cfg.unsent = atoi(optarg); break;
        case 'p': cfg.no_probe = true; break;
        case 'l': cfg.release = true; break;
        case 'o': cfg.options = true; break;
        case 'm': cfg.move = true; break;
        case 'P': cfg.peers = true; break;
        default: exit(2);
        }
    }
    if (!cfg.batch) cfg.batch = cfg.n;
    bool once = cfg.rounds == 1 && cfg.batch == cfg.n;
    if (cfg.n < 1 || cfg.batch < 1 || cfg.rounds < 1 || (cfg.unacked && cfg.unsent) || (cfg.move && !once)) {
        fputs("usage: reference [--connections N] [--rounds K] [--batch B] [--receive BYTES]\n"
              "                 [--unacked BYTES | --unsent BYTES] [--no-probe] [--release] [--options] [--peers]\n"
              "                 [--move (one round, one batch)]\n",
              stderr);
        exit(2);
    }
}

int main(int argc, char **argv) {
    parse(argc, argv);
    struct rlimit files;
    MUST(getrlimit(RLIMIT_NOFILE, &files));
    files.rlim_cur = files.rlim_max;
    MUST(setrlimit(RLIMIT_NOFILE, &files));

    sock = calloc(cfg.n, sizeof *sock);
    struct cost (*round)[PHASES] = calloc(cfg.rounds, sizeof *round);
    streamed = calloc(cfg.n, sizeof *streamed);

    struct sockaddr_in server = {.sin_family = AF_INET, .sin_port = htons(8000),
                                 .sin_addr.s_addr = inet_addr(cfg.move ? "10.255.0.1" : "127.0.0.1")};
    if (cfg.peers) peers(STDIN_FILENO, &server);  /* for the Python side of the bench, which then has the same peers */
    int pair[2];
    MUST(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
    if (!cfg.move) {
        MUST(unshare(CLONE_NEWNET));  /* a loopback of our own: nobody else's ports, settings and packets */
        if (system("ip link set lo up mtu 1500 && ip route replace local 127.0.0.1 dev lo table local initcwnd 100"))
            die("cannot set lo up");
    }
    pid_t child = MUST(fork());
    if (!child) {
        MUST(prctl(PR_SET_PDEATHSIG, SIGKILL));
        close(pair[0]);
        peers(pair[1], &server);
    }
    close(pair[1]);
    command = pair[0];

    /* One byte more than any queue holds, so that growth shows. Touched now, and not before the fork (which would make
       the pages copy-on-write): no page fault shall be timed. */
    size_t room = queue_bytes() + 1;
    record = mmap(NULL, cfg.n * (sizeof *record + room), PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (record == MAP_FAILED) die("memory for the records");
    if (cfg.move) {
        make_hosts(child);
        enter(host_a);
        tell('a');
    }

    int listener = MUST(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, IPPROTO_TCP));
    set(listener, SOL_SOCKET, SO_REUSEADDR, 1);
    MUST(bind(listener, (struct sockaddr *)&server, sizeof server));
    MUST(listen(listener, 1024));
    accept_all(listener);
    queue_data(room);
    for (int i = 0; i < cfg.rounds; i++) run_round(round[i], room);
    check();
    report(round);
    close(command);
    MUST(waitpid(child, NULL, 0));
    return 0;
}
