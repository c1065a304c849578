/* The reference of the bench: the fewest system calls that save and restore TCP connections correctly.
 *
 * Straight line, no allocation on the way, buffers reused: what the kernel makes everybody pay. N connections go
 * through four phases, each over all N (or --batch B) before the next, and each timed as a whole, in processor time
 * of this thread, since neighbours on a shared machine spoil the clock; only the sum is also given by the clock:
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
 * Needs CAP_NET_ADMIN. Build: gcc -O2 -o reference reference.c reference_scene.c
 */
#include "reference.h"

enum phase { SAVE, CLOSE, RESTORE, RESUME, PHASES };
struct cost { double wall, cpu; };  /* microseconds a connection */
static const char *const phase_name[PHASES] = {"save", "close", "restore", "resume"};

/* The socket options that a restored program would miss first; read in save, set in resume where not default (0). */
static const struct { int level, name; } common_options[] = {
    {IPPROTO_TCP, TCP_NODELAY}, {SOL_SOCKET, SO_KEEPALIVE}, {SOL_SOCKET, SO_BUF_LOCK}, {SOL_SOCKET, SO_PRIORITY},
    {SOL_SOCKET, SO_MARK}, {SOL_SOCKET, SO_REUSEADDR}, {IPPROTO_TCP, TCP_CORK}, {IPPROTO_TCP, TCP_USER_TIMEOUT},
};
#define COMMON_OPTIONS (sizeof common_options / sizeof *common_options)

struct configuration cfg = {.n = 1000, .rounds = 1};
int *sock;
struct record *record;

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

    enter(1);
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
            printf("\"%s\": %.3f, ", phase_name[p], round[i][p].cpu);
            sum.wall += round[i][p].wall;
            sum.cpu += round[i][p].cpu;
        }
        printf("\"cpu\": %.3f, \"wall\": %.3f}", sum.cpu, sum.wall);
    }
    puts("]}");
}

static const struct option long_options[] = {
    {"connections", required_argument, NULL, 'n'}, {"rounds", required_argument, NULL, 'k'},
    {"receive", required_argument, NULL, 'r'},     {"unacked", required_argument, NULL, 'u'},
    {"unsent", required_argument, NULL, 's'},      {"no-probe", no_argument, NULL, 'p'},
    {"release", no_argument, NULL, 'l'},           {"options", no_argument, NULL, 'o'},
    {"move", no_argument, NULL, 'm'},              {"peers", no_argument, NULL, 'P'},
    {"batch", required_argument, NULL, 'b'},       {"paced", no_argument, NULL, 't'},
    {"warm", required_argument, NULL, 'w'},        {NULL, 0, NULL, 0},
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
        case 'w': cfg.warm = atoi(optarg); break;  /* rounds before each one that is timed */
        case 't': cfg.paced = true; break;  /* begin a round when a byte comes, say so when it is done */
        default: exit(2);
        }
    }
    if (!cfg.batch) cfg.batch = cfg.n;
    bool once = cfg.rounds == 1 && cfg.batch == cfg.n;
    if (cfg.n < 1 || cfg.batch < 1 || cfg.rounds < 1 || (cfg.unacked && cfg.unsent) || (cfg.move && !once)) {
        fputs("usage: reference [--connections N] [--rounds K] [--batch B] [--receive BYTES]\n"
              "                 [--unacked BYTES | --unsent BYTES] [--no-probe] [--release] [--options] [--peers]\n"
              "                 [--paced] [--warm ROUNDS] [--move (one round, one batch)]\n",
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

    /* One byte more than any queue holds, so that growth shows. Touched now, and not before the fork (which would make
       the pages copy-on-write): no page fault shall be timed. */
    size_t room = queue_bytes() + 1;
    record = mmap(NULL, cfg.n * (sizeof *record + room), PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (record == MAP_FAILED) die("memory for the records");
    make_scene(pair[0], child);

    int listener = MUST(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, IPPROTO_TCP));
    set(listener, SOL_SOCKET, SO_REUSEADDR, 1);
    MUST(bind(listener, (struct sockaddr *)&server, sizeof server));
    MUST(listen(listener, 1024));
    accept_all(listener);
    queue_data(room);
    for (int i = 0; i < cfg.rounds; i++) {
        char next;
        if (cfg.paced && read(STDIN_FILENO, &next, 1) != 1) die("nobody wants the next round");
        struct cost untimed[PHASES] = {0};
        for (int w = 0; w < cfg.warm; w++) run_round(untimed, room);
        run_round(round[i], room);
        if (cfg.paced) puts(""), fflush(stdout);
    }
    check();
    report(round);
    close(pair[0]);
    MUST(waitpid(child, NULL, 0));
    return 0;
}
