"""The child process that holds one ONNX Runtime session. Runs on the host and on the device.

Needs Python's standard library, numpy and onnxruntime only, so the same file runs under an
emulator or on a device. It reads requests from standard input and answers on standard output.

A message is an 8-byte big-endian length, a JSON header of that length, then the raw bytes of
the arrays the header lists as {"name", "dtype", "shape"}. Requests carry "op"; answers carry
"error" = {"kind", "text"} where the request failed.
"""

import functools
import importlib
import json
import os
import resource
import signal
import sys
import time

# Provider -> the Python package that adds it to an installed onnxruntime.
PLUGINS = {"OpenVINOExecutionProvider": "onnxruntime_ep_openvino"}
LIBRARY_FAULTS = ("cannot open shared object", "Failed to load library", "Failed to load shared")


def read_exact(stream, size):
    """Exactly `size` bytes, or EOFError."""
    data = bytearray()
    while len(data) < size:
        part = stream.read(size - len(data))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def receive(stream):
    """Read one message: (header, arrays by name)."""
    size = int.from_bytes(read_exact(stream, 8), "big")
    header = json.loads(read_exact(stream, size))
    arrays = {}
    for item in header.get("arrays", []):
        import numpy as np

        dtype, shape = np.dtype(item["dtype"]), tuple(item["shape"])
        count = int(np.prod(shape, dtype=np.int64))
        data = read_exact(stream, count * dtype.itemsize)
        arrays[item["name"]] = np.frombuffer(data, dtype).reshape(shape)
    return header, arrays


def send(stream, header, arrays=()):
    """Write one message; `arrays` are (name, array) pairs."""
    if arrays:
        import numpy as np

        arrays = [(name, np.asarray(a, order="C")) for name, a in arrays]
    for name, array in arrays:
        if array.dtype.hasobject:
            raise TypeError(f"'{name}' holds {array.dtype} values, which cannot be passed on")
    header = dict(header)
    header["arrays"] = [
        {"name": name, "dtype": a.dtype.str, "shape": list(a.shape)} for name, a in arrays
    ]
    text = json.dumps(header).encode()
    stream.write(len(text).to_bytes(8, "big") + text)
    for _, array in arrays:
        stream.write(array.tobytes())
    stream.flush()


def status_kib(key):
    """A field of /proc/self/status in KiB, 0 where the kernel does not tell."""
    try:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith(key + ":"):
                    return int(line.split()[1])
    except OSError:
        pass
    return 0


def run_queue_ns():
    """Time this process was ready but waiting for a core, in nanoseconds."""
    try:
        with open("/proc/self/schedstat") as file:
            return int(file.read().split()[1])
    except (OSError, IndexError, ValueError):
        return 0


def cpu_flags():
    """The CPU's features by the kernel's names for them; empty where it does not tell."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() in ("flags", "Features"):
                    return value.split()
    except OSError:
        pass
    return []


def since_start():
    """Seconds since this process was started, None where whoever started it does not tell."""
    started = os.environ.get("EDGEWRIGHT_STARTED")
    return time.monotonic() - float(started) if started else None


def steal_ticks():
    """Clock ticks that a hypervisor gave to others, over all cores since boot; 0 if unknown."""
    try:
        with open("/proc/stat") as file:
            return int(file.readline().split()[8])
    except (OSError, IndexError, ValueError):
        return 0


def count_elements(shapes):
    """Elements of all tensors in the profiler's list of {type: dimensions}."""
    sizes = [1 for item in shapes for _ in item.values()]
    for k, dims in enumerate(dims for item in shapes for dims in item.values()):
        for d in dims:
            sizes[k] *= d
    return sum(sizes)


def shared_tensors(weights, places):
    """(name, value) of the tensors at {name: (dtype, shape, offset)} of a mapped file of bytes.

    On the CPU a value is the place in the file itself, which must outlive it.
    """
    import numpy as np
    import onnxruntime

    for name, (dtype, shape, offset) in places.items():
        end = offset + int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        if not 0 <= offset <= end <= len(weights):
            raise ValueError(f"tensor {name!r} lies outside of the weights")
        array = weights[offset:end].view(dtype).reshape(shape)
        yield name, onnxruntime.OrtValue.ortvalue_from_numpy(array)


def kernels(events):
    """The executed nodes in the events of ONNX Runtime's profile, one entry for each run of one."""
    nodes = []
    for event in events:
        if event.get("cat") == "Node" and event.get("name", "").endswith("_kernel_time"):
            args = event.get("args", {})
            inputs = args.get("input_type_shape", [])
            nodes.append(
                {
                    "name": event["name"][: -len("_kernel_time")],
                    "index": int(args.get("node_index", -1)),
                    "op": args.get("op_name", ""),
                    "provider": args.get("provider", ""),
                    "types": [t for i in inputs for t in i],
                    "elements": count_elements(args.get("output_type_shape", [])),
                    "shapes": [dims for i in inputs for dims in i.values()],
                    "us": event.get("dur", 0),
                }
            )
    return nodes


def plugin_devices(onnxruntime, provider, kind):
    """The devices of type `kind` (CPU, GPU or NPU) that a provider's plug-in offers here.

    Loads the plug-in's library into this process. ImportError: its package is not installed.
    """
    library = importlib.import_module(PLUGINS[provider]).get_library_path()
    onnxruntime.register_execution_provider_library(PLUGINS[provider], library)
    devices = [d for d in onnxruntime.get_ep_devices() if d.ep_name == provider]
    return [d for d in devices if d.device.type.name == kind]


def offer(provider, kind):
    """What runs a provider here: {"onnxruntime", "how": built-in, plug-in or "", "reason"}."""
    import onnxruntime

    found = {"onnxruntime": onnxruntime.__version__, "how": "", "reason": ""}
    available = onnxruntime.get_available_providers()
    if provider in available:
        return {**found, "how": "built-in"}
    missing = f"onnxruntime {onnxruntime.__version__} has {', '.join(available)}"
    if provider not in PLUGINS:
        return {**found, "reason": missing}
    try:
        devices = plugin_devices(onnxruntime, provider, kind)
    except ImportError:
        return {**found, "reason": f"{missing}; no plug-in is installed"}
    except Exception as error:
        return {**found, "reason": f"the plug-in does not load: {str(error)[:300]}"}
    if not devices:
        vendors = {d.device.vendor for d in onnxruntime.get_ep_devices()}
        reason = f"the plug-in offers no {kind} here (maker: {', '.join(sorted(vendors))})"
        return {**found, "reason": reason}
    return {**found, "how": "plug-in"}


def add_provider(onnxruntime, options, provider, settings):
    """Give the session options a provider's plug-in, or return the providers to ask for.

    A plug-in takes its device from the list it offers; `device_type` says which.
    """
    if provider in onnxruntime.get_available_providers():
        return [(provider, settings)]
    if provider not in PLUGINS:
        raise LookupError(
            f"provider {provider} is not in this onnxruntime "
            f"(it has {', '.join(onnxruntime.get_available_providers())})"
        )
    kind = settings.get("device_type", "CPU")
    devices = plugin_devices(onnxruntime, provider, kind)
    if not devices:
        raise LookupError(f"the plug-in of {provider} offers no {kind} on this machine")
    rest = {key: value for key, value in settings.items() if key != "device_type"}
    options.add_provider_for_devices(devices[:1], rest)
    return None


def bound_run(session, binding):
    """A function that runs a session with a binding.

    Where the session has it, the function that `run_with_iobinding` passes everything on to: the
    way through Python costs 0.5 % of a model of 0.2 ms, and 1.5 % beside busy processes.
    """
    inner, bound = getattr(session, "_sess", None), getattr(binding, "_iobinding", None)
    if hasattr(inner, "run_with_iobinding") and bound is not None:
        return functools.partial(inner.run_with_iobinding, bound, None)
    return functools.partial(session.run_with_iobinding, binding)


def device_memory():
    """(bytes that this process holds on GPUs or None, why it is not known), from NVML."""
    try:
        pynvml = importlib.import_module("pynvml")  # of nvidia-ml-py, where it is installed
    except ImportError:
        return None, "the package nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
        used = []
        for k in range(pynvml.nvmlDeviceGetCount()):
            gpu = pynvml.nvmlDeviceGetHandleByIndex(k)
            running = pynvml.nvmlDeviceGetComputeRunningProcesses(gpu)
            used += [p.usedGpuMemory for p in running if p.pid == os.getpid()]
    except pynvml.NVMLError as error:
        return None, f"NVML: {error}"
    if not used or None in used:  # in a container the driver knows other process numbers
        return None, "NVML does not list this process"
    return sum(used), ""


class Server:
    """State of the worker: one session, the feeds to cycle through."""

    def __init__(self):
        self.session = self.open_session = None
        self.borrowed = []  # tensors that are not the session's own must outlive it
        self.binding = None  # (device, number) where inputs and outputs are bound there
        self.bound = {}
        self.feeds = []
        self.turn = 0
        self.import_s = 0.0

    def load(self, header, _):
        if header.get("cores"):  # a remote process can be pinned by itself only
            os.sched_setaffinity(0, header["cores"])
        begin = time.perf_counter()
        import onnxruntime

        self.import_s = time.perf_counter() - begin
        before = status_kib("VmRSS")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = header.get("threads", 1)
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        options.use_deterministic_compute = True
        options.graph_optimization_level = getattr(
            onnxruntime.GraphOptimizationLevel, header.get("level", "ORT_ENABLE_ALL")
        )
        options.enable_cpu_mem_arena = header.get("arena", True)
        for key, value in header.get("session", {}).items():
            options.add_session_config_entry(key, value)
        self.borrowed = []
        if header.get("places"):
            import numpy as np

            beside = os.path.join(os.path.dirname(header["model"]), header["weights"])
            mapped = np.memmap(beside, mode="r", dtype=np.uint8)
            self.borrowed = list(shared_tensors(mapped, header["places"]))
        for name, value in self.borrowed:
            options.add_initializer(name, value)
            # Or the session would make copies of its own, as it always does otherwise.
            options.add_session_config_entry("session.disable_prepacking", "1")
        if header.get("optimized"):
            options.optimized_model_filepath = header["optimized"]
        if header.get("profile"):
            options.enable_profiling = True
            options.profile_file_prefix = header["profile"]
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        wanted = header.get("provider", "CPUExecutionProvider")
        settings = header.get("provider_options", {})
        providers = add_provider(onnxruntime, options, wanted, settings)

        def open_session():
            # Without fallback: Python would try again on the CPU and say nothing.
            return onnxruntime.InferenceSession(
                header["model"], options, providers=providers, enable_fallback=0
            )

        begin = time.perf_counter()
        self.open_session = open_session
        try:
            self.session = open_session()
        except Exception as error:
            if wanted != "CPUExecutionProvider" and any(t in str(error) for t in LIBRARY_FAULTS):
                raise LookupError(f"provider {wanted} does not load: {error}") from None
            raise
        load_s = time.perf_counter() - begin
        if wanted not in self.session.get_providers():
            raise LookupError(f"provider {wanted} refused the session: wrong options or no library")
        if header.get("bind"):
            self.binding = (header["bind"], int(settings.get("device_id", 0)))

        def describe(values):
            return [{"name": v.name, "type": v.type, "shape": v.shape} for v in values]

        return {
            "inputs": describe(self.session.get_inputs()),
            "outputs": describe(self.session.get_outputs()),
            "providers": self.session.get_providers(),
            "version": onnxruntime.__version__,
            "import_s": self.import_s,
            "load_s": load_s,
            "rss_before_load_kib": before,
            "rss_after_load_kib": status_kib("VmRSS"),
            "peak_after_load_kib": status_kib("VmHWM"),
            "cores": os.cpu_count(),
            "ready_s": since_start(),
            "flags": cpu_flags(),
        }, ()

    def run(self, header, arrays):
        names = header.get("outputs")
        values = self.session.run(names, arrays)
        names = names or [o.name for o in self.session.get_outputs()]
        return {}, list(zip(names, values))

    def keep_feeds(self, header, arrays):
        if header.get("first"):
            self.feeds, self.bound = [], {}
        self.feeds.append(dict(arrays))
        return {"count": len(self.feeds)}, ()

    def call(self, k):
        """A function that runs feed number k (modulo their number) once.

        Bound: the inputs were copied to the device before, the outputs stay there; a run ends
        when the device has finished.
        """
        k %= len(self.feeds)
        if self.binding is None:
            return self.call_here(self.feeds[k])
        if k not in self.bound:
            self.bound[k] = self.bind(self.feeds[k])
        session, binding = self.session, self.bound[k]

        def run():
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return run

    def call_here(self, feed):
        """A function that runs the feed once, bound as it lies in memory.

        Passing dictionaries costs 11 % of a model of 0.16 ms, which no loop in C pays. What
        cannot be bound (sequences, maps, strings) is passed.
        """
        session = self.session
        kinds = [value.type for value in (*session.get_inputs(), *session.get_outputs())]
        if not all(k.startswith("tensor(") and k != "tensor(string)" for k in kinds):
            return lambda: session.run(None, feed)
        binding = session.io_binding()
        for name, array in feed.items():
            binding.bind_cpu_input(name, array)
        for value in session.get_outputs():
            binding.bind_output(value.name)
        return bound_run(session, binding)

    def bind(self, feed):
        """A binding of the feed's arrays on the device, and of the outputs wherever they come."""
        import onnxruntime

        binding = self.session.io_binding()
        for name, array in feed.items():
            value = onnxruntime.OrtValue.ortvalue_from_numpy(array, *self.binding)
            binding.bind_ortvalue_input(name, value)
        for output in self.session.get_outputs():
            binding.bind_output(output.name, *self.binding)
        binding.synchronize_inputs()
        return binding

    def warm(self, header, _):
        """Run every feed once: engines are built per size of input. Seconds of each run."""
        seconds = []
        for k in range(len(self.feeds)):
            begin = time.perf_counter()
            self.call(k)()
            seconds.append(time.perf_counter() - begin)
        return {"wall_s": seconds}, ()

    def slice(self, header, _):
        """Run for `seconds` and at least `min_runs` times; wall and CPU seconds of each run.

        `turn`: the feed to begin with, so that two models can be given the same ones.
        """
        walls, cpus = [], []
        calls = [self.call(k) for k in range(len(self.feeds))]
        cpu_clock, wall_clock = time.process_time, time.perf_counter
        self.turn = header.get("turn", self.turn)
        seconds, min_runs = header["seconds"], header.get("min_runs", 1)
        steal = steal_ticks()
        queue, switches = run_queue_ns(), resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        begin = time.perf_counter()
        cpu_begin = time.process_time()
        while len(walls) < min_runs or time.perf_counter() - begin < seconds:
            call = calls[self.turn % len(calls)]
            self.turn += 1
            wall = wall_clock()
            cpu = cpu_clock()  # innermost: one thread on the CPU is judged by it
            call()
            cpu_end = cpu_clock()
            wall_end = wall_clock()
            walls.append(wall_end - wall)
            cpus.append(cpu_end - cpu)
        return {
            "wall_s": walls,
            "cpu_s": cpus,
            "total_wall_s": time.perf_counter() - begin,
            "total_cpu_s": time.process_time() - cpu_begin,
            "run_queue_s": (run_queue_ns() - queue) / 1e9,
            "involuntary_switches": resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - switches,
            "steal_ticks": steal_ticks() - steal,
        }, ()

    def memory(self, header, _):
        """Peak resident KiB over `runs` runs, the high-water mark reset before them.

        `order`: the feeds to run instead, by number. `seconds`: after these, two runs are
        enough. `first_run_s`: time of the first run. `device`: also what is held on GPUs after
        the runs, which is the peak, since the runtime's arena there never shrinks.
        """
        reset = True
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        except OSError:
            reset = False
        first_run_s = 0.0
        begin = time.perf_counter()
        for done, k in enumerate(header.get("order") or range(header.get("runs", 3))):
            if done >= 2 and time.perf_counter() - begin > header.get("seconds", float("inf")):
                break
            self.call(k)()
            first_run_s = first_run_s or time.perf_counter() - begin
        peak = {"peak_kib": status_kib("VmHWM"), "reset": reset, "first_run_s": first_run_s}
        if header.get("device"):
            peak["device_bytes"], peak["device_reason"] = device_memory()
        return peak, ()

    def restart(self, header, _):
        """Create the session anew, run it once and drop it: seconds of that.

        The process and the runtime are there already; what is left of a cold start is the model's.
        """
        wall, cpu = time.perf_counter(), time.process_time()
        self.open_session().run(None, self.feeds[0])
        cpu_s = time.process_time() - cpu
        return {"wall_s": time.perf_counter() - wall, "cpu_s": cpu_s}, ()

    def spin(self, header, _):
        """A fixed piece of work that touches no model: its time tells how quiet the machine is."""
        begin = time.perf_counter()
        sum(range(header["count"]))
        return {"wall_s": time.perf_counter() - begin}, ()

    def profile(self, header, _):
        """Run at most `runs` times under the profiler and return what it recorded.

        After `seconds`, `least` runs are enough; `runs` of the answer is their number.
        """
        done, begin = 0, time.perf_counter()
        late, least = header.get("seconds", float("inf")), header.get("least", 1)
        while done < header.get("runs", 10):
            if done >= least and time.perf_counter() - begin > late:
                break
            self.session.run(None, self.feeds[done % len(self.feeds)])
            done += 1
        path = self.session.end_profiling()
        with open(path) as file:
            events = json.load(file)
        os.unlink(path)
        return {"nodes": kernels(events), "runs": done, "assigned": self.assigned()}, ()

    def assigned(self):
        """[{"provider", "nodes": [{"name", "op"}]}] as the runtime assigned them; None: unknown.

        The graph is that after basic optimisations: names are mostly those of the file. A
        compiling provider makes one node of each group.
        """
        if not hasattr(self.session, "get_provider_graph_assignment_info"):
            return None  # before onnxruntime 1.24
        return [
            {
                "provider": group.ep_name,
                "nodes": [{"name": n.name, "op": n.op_type} for n in group.get_nodes()],
            }
            for group in self.session.get_provider_graph_assignment_info()
        ]

    def handlers(self):
        """What answers each operation."""
        return {
            "load": self.load,
            "run": self.run,
            "feeds": self.keep_feeds,
            "warm": self.warm,
            "slice": self.slice,
            "memory": self.memory,
            "restart": self.restart,
            "profile": self.profile,
            "spin": self.spin,
        }


def serve(source, sink):
    """Answer requests until end of input or `quit`."""
    handlers = Server().handlers()
    while True:
        try:
            header, arrays = receive(source)
        except EOFError:
            return
        if header["op"] == "quit":
            return
        try:
            answer, values = handlers[header["op"]](header, arrays)
            send(sink, answer, values)
        except Exception as error:  # the parent turns it into a message; nothing is lost
            kind = type(error).__name__
            send(sink, {"error": {"kind": kind, "text": str(error)[:2000]}})


def die_with_parent():
    """Ask the kernel to end this process with its parent (Linux, PR_SET_PDEATHSIG = 1)."""
    try:
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    except (ImportError, OSError, AttributeError):
        pass  # the end of standard input ends the worker, too, only later


def main():
    """Set limits (first argument: bytes of address space, 0 for none), then serve.

    Second argument "early": there is time to load the runtime before the first request comes.
    `offer PROVIDER KIND` instead prints what runs the provider here, as JSON.
    """
    die_with_parent()
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # see edgewright/__init__.py
    if sys.argv[1:2] == ["offer"]:
        sink = os.dup(1)
        os.dup2(2, 1)
        os.write(sink, json.dumps(offer(*sys.argv[2:4])).encode())
        return
    limit = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    if limit:
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)  # a limit cannot be raised again
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not get between the messages
    if sys.argv[2:] == ["early"]:
        try:
            import onnxruntime  # noqa: F401
        except ImportError:
            pass  # the first request will say so
    serve(sys.stdin.buffer, sink)


if __name__ == "__main__":
    main()
