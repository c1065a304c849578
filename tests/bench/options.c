/* What the kernel takes for setting options on a socket, and nothing else: the floor under any program that carries them.
 *
 * options --connections N --rounds K [--paced] LEVEL:NUMBER:HEX...   each call a setsockopt(2), its value in hexadecimal
 *
 * A value of SO_ATTACH_FILTER is the filter's instructions. Arguments and report are as of reference.c.
 */
#define _GNU_SOURCE
#include <getopt.h>
#include <linux/filter.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MOST 256
static struct call { int level, number; socklen_t length; unsigned char value[64]; struct sock_fprog filter; } calls[MOST];

static double cpu(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

static void parse(struct call *call, const char *word) {
    int at = 0;
    if (sscanf(word, "%d:%d:%n", &call->level, &call->number, &at) < 2 || !at) exit(2);
    for (unsigned byte; call->length < sizeof call->value && sscanf(word + at, "%2x", &byte) == 1; at += 2)
        call->value[call->length++] = byte;
    if (call->level == SOL_SOCKET && call->number == SO_ATTACH_FILTER)
        call->filter = (struct sock_fprog){call->length / sizeof(struct sock_filter), (void *)call->value};
}

static bool set(int fd, const struct call *call) {
    if (call->filter.len) return !setsockopt(fd, call->level, call->number, &call->filter, sizeof call->filter);
    return !setsockopt(fd, call->level, call->number, call->value, call->length);
}

int main(int argc, char **argv) {
    static const struct option names[] = {
        {"connections", required_argument, NULL, 'n'}, {"rounds", required_argument, NULL, 'k'},
        {"paced", no_argument, NULL, 't'},             {NULL, 0, NULL, 0},
    };
    int n = 1000, rounds = 1, set_of_one = 0;
    bool paced = false;
    for (int letter; (letter = getopt_long(argc, argv, "", names, NULL)) != -1;) {
        if (letter == 'n') n = atoi(optarg);
        else if (letter == 'k') rounds = atoi(optarg);
        else if (letter == 't') paced = true;
        else exit(2);
    }
    int count = argc - optind;
    if (n < 1 || rounds < 1 || count < 1 || count > MOST) exit(2);
    for (int i = 0; i < count; i++) parse(&calls[i], argv[optind + i]);
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);

    int *sock = calloc(n, sizeof *sock);
    double *round = calloc(rounds, sizeof *round);
    for (int k = 0; k < rounds; k++) {
        char next;
        if (paced && read(STDIN_FILENO, &next, 1) != 1) return 1;
        for (int i = 0; i < n; i++)
            if ((sock[i] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) < 0) return perror("socket"), 1;
        double start = cpu();
        set_of_one = 0;
        for (int i = 0; i < n; i++)
            for (int call = 0; call < count; call++) set_of_one += set(sock[i], &calls[call]);
        round[k] = (cpu() - start) / n;
        for (int i = 0; i < n; i++) close(sock[i]);
        if (paced) puts(""), fflush(stdout);
    }
    printf("{\"v\": 1, \"connections\": %d, \"set\": %d, \"rounds\": [", n, set_of_one / n);
    for (int k = 0; k < rounds; k++) printf("%s{\"cpu\": %.3f}", k ? ", " : "", round[k]);
    puts("]}");
    return 0;
}
