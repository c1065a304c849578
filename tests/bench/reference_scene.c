/* The scene of the reference: peers in a process of their own, the wires to them, the queues, the check at the end. */
#include "reference.h"

#define PEER_BUFFER 16384         /* SO_RCVBUF of a peer that is to shut its window */
#define QUIET 250000              /* microseconds: longer than a delayed ACK (200 ms), which would draw a RST */
#define PATIENCE 30.0             /* seconds until set-up or check give up */
#define LINUX_SIOCINQ 0x541B
#define LINUX_SIOCOUTQ 0x5411

static uint64_t *streamed;        /* bytes ever sent to each peer; goes to them with the command to read */
static int command;               /* the server's end of the pipe to the peers */
static int host[2] = {-1, -1};

_Noreturn void die(const char *format, ...) {
    int saved = errno;
    va_list arguments;
    va_start(arguments, format);
    fputs("reference: ", stderr);
    vfprintf(stderr, format, arguments);
    fprintf(stderr, ": %s\n", strerror(saved));
    exit(1);
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

_Noreturn void peers(int control, const struct sockaddr_in *server) {
    int *peer = calloc(cfg.n, sizeof *peer);
    size_t *seen = calloc(cfg.n, sizeof *seen);
    streamed = calloc(cfg.n, sizeof *streamed);
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

void tell(char letter) {
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
        host[wire - 'a'] = MUST(open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC));
    }
}

void enter(int which) {
    if (cfg.move) MUST(setns(host[which], CLONE_NEWNET));
}

void accept_all(int listener) {
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

void queue_data(size_t room) {
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
    /* A timer may probe a shut window at any moment. No hold stands: an answer after the close would draw a RST. */
    if (cfg.unsent) tell('d');
    if (queue_bytes()) usleep(QUIET);
}

/* Every connection delivers what was queued and one byte more, and the peer's answer arrives. */
void check(void) {
    unsigned char *data = malloc(cfg.receive + 1);
    if (cfg.unacked | cfg.unsent) tell('h');
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

void make_scene(int control, pid_t child) {
    command = control;
    streamed = calloc(cfg.n, sizeof *streamed);
    if (!cfg.move) return;
    make_hosts(child);
    enter(0);
    tell('a');
}
