/* Sends without end, as fast as the connection takes it, bytes that are a function of their sequence numbers.
 *
 *   bulk PATTERN ADDRESS PORT      serves one connection; says "ready"
 *   bulk PATTERN                   goes on with the connection that is its standard input, as inetd starts a program
 *
 * So whoever goes on with a connection need not know what its predecessor has sent: the file PATTERN, of 64 KiB, begins
 * wherever the sequence number is a multiple of its length.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

enum { LENGTH = 1 << 16, TIMES = 5, CLOSE_WITHOUT_PROBE = -1, SEND_QUEUE = 2 };
static char pattern[TIMES * LENGTH];

static void check(int result, const char *what) {
    if (result < 0) {
        perror(what);
        exit(1);
    }
}

static void set(int sock, int option, int value) {
    check(setsockopt(sock, IPPROTO_TCP, option, &value, sizeof value), "setsockopt");
}

static int serve(const char *address, const char *port) {
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};
    int listener = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    check(inet_pton(AF_INET, address, &here.sin_addr) - 1, "address");
    check(setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on), "SO_REUSEADDR");
    check(bind(listener, (struct sockaddr *)&here, sizeof here), "bind");
    check(listen(listener, 1), "listen");
    puts("ready");
    fflush(stdout);
    int sock = accept(listener, NULL, NULL);
    check(sock, "accept");
    close(listener);
    return sock;
}

/* The sequence number of the next byte. Only repair mode tells it, and a socket in repair mode with something left to
 * send would count that as sent: so not before all is acknowledged. */
static uint32_t position(int sock) {
    uint32_t number;
    socklen_t size = sizeof number;
    for (int waiting = 1; waiting;) {
        check(ioctl(sock, SIOCOUTQ, &waiting), "SIOCOUTQ");
        if (waiting) usleep(50);
    }
    set(sock, TCP_REPAIR, 1);
    set(sock, TCP_REPAIR_QUEUE, SEND_QUEUE);
    check(getsockopt(sock, IPPROTO_TCP, TCP_QUEUE_SEQ, &number, &size), "TCP_QUEUE_SEQ");
    set(sock, TCP_REPAIR, CLOSE_WITHOUT_PROBE);
    return number;
}

int main(int count, char **words) {
    if (count != 2 && count != 4) return 2;
    int file = open(words[1], O_RDONLY);
    check(file, "pattern");
    check(read(file, pattern, LENGTH) == LENGTH ? 0 : -1, "pattern");
    for (int i = 1; i < TIMES; i++) memcpy(pattern + i * LENGTH, pattern, LENGTH);
    int sock = count == 4 ? serve(words[2], words[3]) : STDIN_FILENO;
    for (uint32_t at = position(sock);;) {
        ssize_t sent = send(sock, pattern + at % LENGTH, (TIMES - 1) * LENGTH, MSG_NOSIGNAL);
        if (sent > 0)
            at += sent;
        else if (errno == EINVAL || errno == EPERM)
            usleep(200); /* frozen: it moves, or goes on here */
        else
            return 0; /* ECONNABORTED: it moved away */
    }
}
