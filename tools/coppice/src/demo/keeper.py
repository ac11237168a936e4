# A process whose state exists only in memory: a word it was told, a count of
# the questions it answered, and a list that grows. It listens on a vsock port,
# one line in, one line out.
import os, socket, sys, time

word, answered, marks = "", 0, []
ballast = bytearray(b"".join(n.to_bytes(8, "little") * 512 for n in range(256)))


def answer(line):
    global word, answered
    answered += 1
    verb, _, rest = line.partition(" ")
    if verb == "remember":
        word = rest
        return "ok"
    if verb == "recall":
        return word
    if verb == "count":
        return str(answered)
    if verb == "mark":
        marks.append(rest)
        return "ok"
    if verb == "marks":
        return ",".join(marks)
    if verb == "random":
        return os.urandom(16).hex()
    if verb == "time":
        return repr(time.time())
    if verb == "touch":
        for page in range(int(rest)):
            ballast[page * 4096 : page * 4096 + 16] = os.urandom(16)
        return "ok"
    return "what?"


listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
listener.bind((socket.VMADDR_CID_ANY, int(sys.argv[1])))
listener.listen(8)
while True:
    try:
        connection, _ = listener.accept()
    except OSError:
        continue
    try:
        buffered = b""
        while True:
            data = connection.recv(4096)
            if not data:
                break
            buffered += data
            while b"\n" in buffered:
                line, _, buffered = buffered.partition(b"\n")
                connection.sendall(answer(line.decode()).encode() + b"\n")
    except OSError:
        pass
    finally:
        connection.close()
