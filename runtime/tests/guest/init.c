/* A guest in one file: PID 1 of the machine tests. It serves one line per
 * vsock connection on port 1024 and keeps its state in memory. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#include <linux/vm_sockets.h>

static unsigned long counter;
static unsigned char block[1 << 16];

static void say(int fd, const char *text) {
    size_t left = strlen(text);
    while (left > 0) {
        ssize_t n = write(fd, text, left);
        if (n <= 0) return;
        text += n;
        left -= n;
    }
}

static void echo(int fd) {
    ssize_t n;
    while ((n = read(fd, block, sizeof block)) > 0) {
        for (ssize_t at = 0; at < n;) {
            ssize_t m = write(fd, block + at, n - at);
            if (m <= 0) return;
            at += m;
        }
    }
}

static void put(int fd, const char *path, const char *text) {
    int file = open(path, O_CREAT | O_TRUNC | O_WRONLY, 0644);
    if (file < 0 || write(file, text, strlen(text)) < 0 || fsync(file) != 0) say(fd, "failed\n");
    else say(fd, "done\n");
    if (file >= 0) close(file);
}

static void get(int fd, const char *path) {
    int file = open(path, O_RDONLY);
    ssize_t n = file < 0 ? -1 : read(file, block, sizeof block);
    if (n < 0) say(fd, "failed\n");
    else if (write(fd, block, n) < 0) return;
    if (file >= 0) close(file);
}

static void sum(int fd, const char *path) {
    uint32_t total = 0;
    char text[64];
    ssize_t n;
    int file = open(path, O_RDONLY | O_DIRECT);
    static unsigned char data[1 << 16] __attribute__((aligned(4096)));
    if (file < 0) { say(fd, "failed\n"); return; }
    while ((n = read(file, data, sizeof data)) > 0)
        for (ssize_t i = 0; i < n; i++) total = total * 31 + data[i];
    close(file);
    snprintf(text, sizeof text, n < 0 ? "failed %d\n" : "%u\n", n < 0 ? errno : total);
    say(fd, text);
}

static void serve(int fd) {
    char line[512] = {0}, text[128];
    size_t len = 0;
    while (len + 1 < sizeof line && read(fd, line + len, 1) == 1 && line[len] != '\n') len++;
    line[len] = 0;
    char *word = strtok(line, " "), *first = strtok(NULL, " "), *second = strtok(NULL, " ");
    if (!word) return;
    if (!strcmp(word, "count")) {
        snprintf(text, sizeof text, "%lu\n", ++counter);
        say(fd, text);
    } else if (!strcmp(word, "echo")) echo(fd);
    else if (!strcmp(word, "put") && first && second) put(fd, first, second);
    else if (!strcmp(word, "get") && first) get(fd, first);
    else if (!strcmp(word, "sum") && first) sum(fd, first);
    else if (!strcmp(word, "random")) {
        /* The driver holds some bytes that it asked for earlier. */
        int file = open("/dev/hwrng", O_RDONLY);
        for (int i = 0; i < 16; i++)
            if (file < 0 || read(file, block, 16) != 16) { say(fd, "failed\n"); return; }
        for (int i = 0; i < 16; i++) snprintf(text + 2 * i, 3, "%02x", block[i]);
        say(fd, text);
        close(file);
    } else if (!strcmp(word, "clock")) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        snprintf(text, sizeof text, "%lld\n", (long long)now.tv_sec * 1000 + now.tv_nsec / 1000000);
        say(fd, text);
    } else if (!strcmp(word, "call")) {
        /* The host listens on no port: this must be refused, not hang. */
        struct sockaddr_vm host = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = 5};
        int call = socket(AF_VSOCK, SOCK_STREAM, 0);
        int result = connect(call, (struct sockaddr *)&host, sizeof host);
        snprintf(text, sizeof text, "%d\n", result == 0 ? 0 : errno);
        close(call);
        say(fd, text);
    } else if (!strcmp(word, "restart")) reboot(RB_AUTOBOOT);
    else say(fd, "what?\n");
}

int main(void) {
    struct sockaddr_vm here = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = 1024};
    int listener = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (bind(listener, (struct sockaddr *)&here, sizeof here) || listen(listener, 16)) {
        printf("no vsock: %s\n", strerror(errno));
        return 1;
    }
    printf("GUEST READY\n");
    fflush(stdout);
    for (;;) {
        int fd = accept(listener, NULL, NULL);
        if (fd < 0) continue;
        serve(fd);
        close(fd);
    }
}
