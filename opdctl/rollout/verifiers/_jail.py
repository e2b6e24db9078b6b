"""The program that ``_sandbox.py`` starts: it shuts itself in, then runs one solution.

It is text, given to an interpreter of its own, so that nothing of this package has to be readable
from inside. Three processes: the first holds the clock and ends all the others; the second is the
first of its own process namespace, so that its end is the end of every process below it; the third
gives up its rights, sets its limits and runs the solution. Where the kernel allows no namespaces
the first ends by name whatever descends from it.
"""

from __future__ import annotations

JAIL = r"""
import builtins, ctypes, json, os, resource, signal, sys, time

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1, 2, 4, 32, 4096, 16384, 1 << 18)
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 1 << 17, 1 << 27, 1 << 28, 1 << 29, 1 << 30
PDEATHSIG, NO_NEW_PRIVS, SUBREAPER = 1, 38, 36

keys = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
user, group, first = os.getuid(), os.getgid(), os.getpid()


def call(name, *arguments):
    if getattr(libc, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, name + ": " + os.strerror(number))


def mount(source, target, kind, flags, data=None):
    texts = [t if t is None else os.fsencode(t) for t in (source, target, kind)]
    call("mount", *texts, ctypes.c_ulong(flags), data and data.encode())


def alone():
    # Own network (without so much as a loopback), processes, mounts and shared memory.
    flags = NEWNS | NEWPID | NEWNET | NEWIPC
    call("unshare", flags if user == 0 else flags | NEWUSER)
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"),
                           ("gid_map", f"{group} {group} 1")):
            file = os.open(f"/proc/self/{name}", os.O_WRONLY)
            os.write(file, text.encode())
            os.close(file)


def furnish(root, owner):
    # A root of its own: Python and the system's libraries, read only; a small disk in memory.
    os.umask(0o022)  # the solution's user goes through the folders made here
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    size = f"size={keys['disk_mib']}m,mode=0755"
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, size)
    for name in ("box", "tmp"):  # before what is wanted, which may lie below /tmp
        os.mkdir(f"{root}/{name}", 0o700)
        os.chown(f"{root}/{name}", owner, owner if user == 0 else group)
    wanted = ["/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", sys.base_prefix, sys.prefix]
    wanted += [os.path.realpath(p) for p in wanted[-2:]]  # they may be links
    wanted += [os.path.dirname(os.path.realpath(sys.executable))]
    wanted += ["/dev/null", "/dev/zero", "/dev/urandom"]
    placed = []
    for path in wanted:
        if not os.path.exists(path) or path == "/" or any(
                path == p or path.startswith(p + "/") for p in placed):
            continue
        place = root + path
        os.makedirs(os.path.dirname(place), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), place)
            continue
        os.makedirs(place) if os.path.isdir(path) else open(place, "x").close()
        mount(path, place, None, MS_BIND | MS_REC)
        kept = os.statvfs(place).f_flag & 0xC0F  # a user may not take these off: nosuid, noatime...
        if not path.startswith("/dev/"):
            mount(None, place, None, MS_REMOUNT | MS_BIND | MS_RDONLY | kept)
        placed.append(path)
    os.chroot(root)
    os.chdir("/box")


def processes_of(owner):
    count = 0
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.stat("/proc/" + name).st_uid == owner:
                count += len(os.listdir(f"/proc/{name}/task"))
        except OSError:
            pass
    return count


def give_up(owner, isolated):
    most = keys["processes"]
    if not isolated and user:
        most += processes_of(user)  # they count together with all that the user runs
    if user == 0:
        os.setgroups([])
        os.setgid(owner)
        os.setuid(owner)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    call("capset", header, (ctypes.c_uint32 * 6)())
    libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    mib = 1 << 20
    for name, value in (("CPU", keys["seconds"]), ("AS", keys["memory_mib"] * mib), ("CORE", 0),
                        ("FSIZE", keys["file_mib"] * mib), ("NPROC", most), ("NOFILE", 64)):
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))


def whole(fd):
    # One message: its length in eight bytes, then JSON.
    text = b""
    size = 8
    while len(text) < size:
        more = os.read(fd, size - len(text))
        if not more:
            os._exit(3)
        text += more
        if size == 8 and len(text) == 8:
            size += int.from_bytes(text, "big")
    return json.loads(text[8:])


def named(code):
    inner = [named(c) for c in code.co_consts if hasattr(c, "co_names")]
    return set(code.co_names).union(*inner)


def solve(owner, isolated):
    for fd, place in ((keys["input"], 0), (keys["output"], 1)):
        os.dup2(fd, place)
    control = keys["control"]
    os.dup2(os.open("/dev/null", os.O_WRONLY), 2)
    os.closerange(3, control)
    os.closerange(control + 1, 1024)
    os.environ.update(PATH="/usr/bin:/bin", HOME=os.getcwd())
    give_up(owner, isolated)
    sys.argv = ["solution.py"]
    run, parse, write, leave, names = exec, compile, os.write, os._exit, dict(vars(builtins))
    read, listen, copy, look = whole, control, dict, named
    asked = read(listen)
    if asked["script"]:
        os.close(control)
        spaces = {"__name__": "__main__", "__builtins__": builtins}
        run(parse(asked["solution"], "solution.py", "exec"), spaces)
        sys.stdout.flush()
        leave(0)
    spaces = {"__name__": "solution", "__builtins__": builtins}
    run(parse(asked["solution"], "solution.py", "exec"), spaces)
    write(listen, b"loaded")
    asked = read(listen)
    tests = [parse(test, "tests.py", "exec") for test in asked["tests"]]
    used = set().union(*[look(test) for test in tests])
    theirs = {k: v for k, v in spaces.items() if k in used and k[:2] != "__"}
    if any(k not in names for k in theirs):  # else it is a function called sum that is tested
        theirs = {k: v for k, v in theirs.items() if k not in names}
    own = copy(names)  # as it was before the solution: tests do not see what it puts over builtins
    own.update(theirs)
    own["__builtins__"], own["__name__"] = copy(names), "tests"
    for test in tests:
        run(test, own)
    write(listen, asked["token"].encode())
    leave(0)


def below():
    # Every process that descends from this one.
    above = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    above[int(name)] = int(file.read().rpartition(")")[2].split()[1])
            except OSError:
                pass
    found, size = {first}, 0
    while len(found) != size:
        size = len(found)
        found |= {p for p, parent in above.items() if parent in found}
    return found - {first}


def end(child):
    if status is None:  # or its number may be another's by now
        os.kill(child, signal.SIGKILL)
    stop = time.monotonic() + 20
    while time.monotonic() < stop:
        for process in below():
            try:
                os.kill(process, signal.SIGKILL)
            except OSError:
                pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return True
        time.sleep(0.005)
    return False


libc.prctl(SUBREAPER, 1, 0, 0, 0)
libc.prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0)
isolated, why = False, "not asked for"
if keys["namespaces"]:
    try:
        alone()
        isolated, why = True, ""
    except OSError as error:
        why = str(error)
owner = 2000000000 + first % 100000000 if user == 0 else user
child = os.fork()
if child == 0:
    code = 70
    try:
        libc.prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.setsid()
        if isolated:
            furnish(keys["folder"], owner)
        else:
            os.chown(keys["folder"], owner, owner if user == 0 else group)
        inner = os.fork()
        if inner == 0:
            code = 71
            solve(owner, isolated)
        os.close(keys["control"])
        done = 0
        while done != inner:
            done, status = os.waitpid(-1, 0)
        code = 0 if status == 0 else 72
    except BaseException as error:
        if code == 70:
            os.write(2, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(code)
os.close(keys["control"])
stop, status, late = time.monotonic() + keys["wall"], None, False
while status is None and not late:
    done, value = os.waitpid(child, os.WNOHANG)
    if done:
        status = os.waitstatus_to_exitcode(value)
    else:
        late = time.monotonic() > stop
        time.sleep(0.005)
cleared = end(child)
report = {"code": status, "late": late, "isolated": isolated, "why": why, "cleared": cleared}
print(json.dumps(report))
"""
