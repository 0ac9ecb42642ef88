import threading, time, torch, sys
from tpserve.bench.engine_runs import Engine
def main():
    e = Engine("7B", 1, "bfloat16")
    print("start_s", e.start_s)
    for p in (128, 1024):
        for _ in range(3): e.run(1, p, 1)
        print(p, [round(1e3*e.run(1, p, 1),2) for _ in range(10)])
        out = []
        th = threading.Thread(target=lambda: out.extend(e.client.trace(2)))
        th.start(); time.sleep(1.5)
        e.run(1, p, 1); th.join()
        t0=min(s.start_ns for s in out[0].spans)
        for s in sorted(out[0].spans, key=lambda s: s.start_ns):
            print("   ", s.track, s.name, round((s.start_ns-t0)/1e3), round(s.duration_ns/1e3), s.about)
    for n in (64,):
        out=[]
        e.run(n,512,8)
        t0=time.perf_counter(); s=e.run(n,512,256); print("64 req tok/s", n*256/s)
        th = threading.Thread(target=lambda: out.extend(e.client.trace(12)))
        th.start(); time.sleep(1.5)
        e.run(n,512,40); th.join()
        t0=min(s.start_ns for s in out[0].spans)
        for s in sorted(out[0].spans, key=lambda s: s.start_ns):
            print("   ", s.track, s.name, round((s.start_ns-t0)/1e3), round(s.duration_ns/1e3), s.about)
    e.close()
main()
