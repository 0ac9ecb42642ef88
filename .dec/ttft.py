import threading, time, torch, sys
from tpserve.bench.engine_runs import Engine
def trace(e, n, p, new, steps):
    out=[]
    th = threading.Thread(target=lambda: out.extend(e.client.trace(steps)))
    th.start(); time.sleep(0.1)
    e.run(n, p, new); th.join()
    if not out[0].spans: print("no spans"); return
    t0=min(s.start_ns for s in out[0].spans)
    for s in sorted(out[0].spans, key=lambda s: s.start_ns):
        print("   ", s.track, s.name, round((s.start_ns-t0)/1e3), round(s.duration_ns/1e3), s.about)
def main():
    e = Engine("7B", 1, "bfloat16")
    print("start_s", e.start_s)
    for p in (128, 1024):
        for _ in range(3): e.run(1, p, 1)
        print(p, [round(1e3*e.run(1, p, 1),2) for _ in range(10)])
        trace(e, 1, p, 1, 5)
    for n in (64,256):
        e.run(n,512,8)
        for _ in range(2):
            s=e.run(n,512,256); print(n, "req tok/s", n*256/s, flush=True)
    trace(e, 64, 512, 30, 24)
    e.close()
main()
