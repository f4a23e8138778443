#![allow(clippy::unwrap_used)]
use super::*;

/// A host made of files.
struct Bed {
    dir: tempfile::TempDir,
    host: Host,
}

impl Bed {
    fn new() -> Bed {
        let dir = tempfile::tempdir().unwrap();
        let host = Host { cgroups: dir.path().join("cgroup"), proc: dir.path().join("proc") };
        Bed { dir, host }
    }
    fn file(&self, path: &str, text: &str) {
        let path = self.dir.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
}

const PRESSURE: &str = "some avg10=1.50 avg60=0.25 avg300=0.10 total=2000000\nfull avg10=0.50 avg60=0.00 avg300=0.00 total=1000000\n";

fn unified() -> Bed {
    let bed = Bed::new();
    bed.file("cgroup/cgroup.controllers", "cpu io memory pids\n");
    // Its init has moved to a cgroup that it made itself.
    bed.file("proc/42/cgroup", "0::/kubepods.slice/cri-containerd-abc.scope/init.scope\n");
    let at = "cgroup/kubepods.slice/cri-containerd-abc.scope";
    for (file, text) in [
        ("cpu.stat", "usage_usec 5000\nuser_usec 3000\nsystem_usec 2000\nnr_periods 10\nnr_throttled 4\nthrottled_usec 700\n"),
        ("cpu.weight", "100\n"),
        ("cpu.max", "50000 100000\n"),
        ("memory.current", "1000000\n"),
        ("memory.max", "2000000\n"),
        ("memory.peak", "1500000\n"),
        ("memory.low", "0\n"),
        ("memory.swap.current", "4096\n"),
        ("memory.swap.max", "8192\n"),
        (
            "memory.stat",
            "anon 300\nfile 400\nkernel 55\nkernel_stack 5\nfile_mapped 20\nactive_file 30\ninactive_file 250000\npgfault 7\npgmajfault 2\n",
        ),
        ("memory.events", "low 0\nhigh 0\nmax 6\noom 1\noom_kill 1\n"),
        ("pids.max", "100\n"),
        ("cgroup.procs", ""),
        ("cgroup.threads", ""),
        ("init.scope/cgroup.procs", "42\n43\n"),
        ("init.scope/cgroup.threads", "42\n43\n44\n"),
        ("cpu.pressure", PRESSURE),
        ("memory.pressure", PRESSURE),
        ("io.pressure", PRESSURE),
        ("io.stat", "8:0 rbytes=100 wbytes=200 rios=3 wios=4 dbytes=5 dios=6\n253:1 rbytes=1 wbytes=2 rios=1 wios=1 dbytes=0 dios=0\n"),
    ] {
        bed.file(&format!("{at}/{file}"), text);
    }
    bed
}

#[test]
fn version_2_is_read_whole() {
    let bed = unified();
    let f = bed.host.of_container("abc", 42, Want::ALL).unwrap();
    let cpu = Cpu {
        usage_ns: 5_000_000,
        user_ns: 3_000_000,
        system_ns: 2_000_000,
        periods: 10,
        throttled_periods: 4,
        throttled_ns: 700_000,
        shares: 2597,
        period_us: 100_000,
    };
    assert_eq!(f.cpu, Some(cpu));
    let m = f.memory.unwrap();
    assert_eq!((m.usage, m.limit, m.max_usage, m.working_set()), (1_000_000, Some(2_000_000), Some(1_500_000), 750_000));
    assert_eq!((m.rss, m.cache, m.kernel, m.mapped, m.active_file), (300, 400, 55, 20, 30));
    assert_eq!((m.page_faults, m.major_page_faults, m.failures, m.oom_kills), (7, 2, 6, 1));
    assert_eq!((m.swap, m.swap_limit, m.configured_swap_limit), (Some(4096), Some(8192), Some(8192)));
    assert_eq!((f.processes, f.threads, f.tasks_limit), (vec![42, 43], 3, 100));
    let some = [(2_000_000_000, 1.5, 0.25, 0.1), (1_000_000_000, 0.5, 0.0, 0.0)];
    assert_eq!(f.pressure, [Some(some); 3]);
    assert_eq!((f.disks.len(), f.disks[0].read_bytes, f.disks[0].writes), (2, 100, 4));
    assert_eq!(f.disks[0].bytes[2], ("Discard".to_owned(), 5));
    assert!(f.at_ns > 0);
}

#[test]
fn only_what_is_asked_for_is_read() {
    let bed = unified();
    let f = bed.host.of_container("abc", 42, Want::CPU).unwrap();
    assert_eq!(f.cpu.unwrap().usage_ns, 5_000_000);
    assert!(f.memory.is_none() && f.processes.is_empty() && f.pressure == [None; 3] && f.disks.is_empty(), "{f:?}");
}

#[test]
fn what_a_kernel_does_not_tell_is_absent() {
    let bed = Bed::new();
    bed.file("cgroup/cgroup.controllers", "");
    bed.file("proc/9/cgroup", "0::/x\n");
    bed.file("cgroup/x/memory.current", "10\n");
    bed.file("cgroup/x/memory.max", "max\n");
    bed.file("cgroup/x/memory.stat", "kernel_stack 3\nslab 4\ninactive_file 99\n");
    let m = bed.host.of_container("none", 9, Want::ALL).unwrap().memory.unwrap();
    assert_eq!((m.limit, m.max_usage, m.swap, m.kernel, m.working_set()), (None, None, None, 7, 0));
    assert!(bed.host.of_container("none", 10, Want::ALL).is_none(), "no such process");
}

#[test]
fn version_1_is_read_whole() {
    let bed = Bed::new();
    bed.file(
        "proc/42/cgroup",
        "5:memory:/pod/abc\n4:cpu,cpuacct:/pod/abc\n3:pids:/pod/abc/sub\n2:blkio:/pod/abc\n1:name=systemd:/elsewhere\n",
    );
    for (file, text) in [
        ("cpuacct/pod/abc/cpuacct.usage", "123456789\n"),
        ("cpuacct/pod/abc/cpuacct.stat", "user 7\nsystem 3\n"),
        ("cpu/pod/abc/cpu.stat", "nr_periods 5\nnr_throttled 2\nthrottled_time 999\n"),
        ("cpu/pod/abc/cpu.shares", "512\n"),
        ("cpu/pod/abc/cpu.cfs_period_us", "100000\n"),
        ("memory/pod/abc/memory.usage_in_bytes", "5000\n"),
        ("memory/pod/abc/memory.limit_in_bytes", "10000\n"),
        ("memory/pod/abc/memory.memsw.usage_in_bytes", "5600\n"),
        ("memory/pod/abc/memory.memsw.limit_in_bytes", "12000\n"),
        ("memory/pod/abc/memory.max_usage_in_bytes", "7000\n"),
        ("memory/pod/abc/memory.soft_limit_in_bytes", "9223372036854771712\n"),
        ("memory/pod/abc/memory.stat", "rss 1\ntotal_rss 11\ntotal_cache 12\ntotal_inactive_file 1000\ntotal_pgfault 8\n"),
        ("memory/pod/abc/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"),
        ("pids/pod/abc/pids.max", "max\n"),
        ("pids/pod/abc/cgroup.procs", "42\n"),
        ("pids/pod/abc/tasks", "42\n50\n"),
        ("pids/pod/abc/sub/cgroup.procs", "51\n"),
        ("blkio/pod/abc/blkio.throttle.io_service_bytes_recursive", "8:0 Read 10\n8:0 Write 20\n8:0 Total 30\nTotal 30\n"),
        ("blkio/pod/abc/blkio.throttle.io_serviced_recursive", "8:0 Read 1\n8:0 Write 2\nTotal 3\n"),
    ] {
        bed.file(&format!("cgroup/{file}"), text);
    }
    let f = bed.host.of_container("abc", 42, Want::ALL).unwrap();
    let cpu = f.cpu.unwrap();
    assert_eq!((cpu.usage_ns, cpu.user_ns, cpu.system_ns), (123_456_789, 70_000_000, 30_000_000));
    assert_eq!((cpu.periods, cpu.throttled_periods, cpu.throttled_ns, cpu.shares, cpu.period_us), (5, 2, 999, 512, 100_000));
    let m = f.memory.unwrap();
    assert_eq!((m.usage, m.limit, m.max_usage, m.rss, m.cache), (5000, Some(10000), Some(7000), 11, 12));
    assert_eq!((m.swap, m.swap_limit, m.configured_swap_limit, m.reservation, m.oom_kills), (Some(600), Some(2000), Some(12000), 0, 3));
    assert_eq!((m.working_set(), f.threads, f.tasks_limit), (4000, 2, 0));
    assert_eq!(f.processes, [42, 51]);
    assert_eq!((f.disks.len(), f.disks[0].device.as_str(), f.disks[0].read_bytes, f.disks[0].writes), (1, "8:0", 10, 2));
    assert_eq!(f.disks[0].bytes.len(), 3);
}

#[test]
fn a_pod_is_found_by_path_or_slice() {
    assert_eq!(slice("kubepods-besteffort-pod1.slice"), "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice");
    assert_eq!(slice("/kubepods.slice"), "kubepods.slice");
    let bed = Bed::new();
    bed.file("cgroup/cgroup.controllers", "");
    bed.file("cgroup/kubepods.slice/kubepods-pod1.slice/cpu.stat", "usage_usec 9\n");
    for parent in ["kubepods-pod1.slice", "/kubepods.slice/kubepods-pod1.slice"] {
        assert_eq!(bed.host.of_parent(parent, Want::CPU).unwrap().cpu.unwrap().usage_ns, 9000, "{parent}");
    }
    assert!(bed.host.of_parent("/no/such", Want::CPU).is_none() && bed.host.of_parent("", Want::CPU).is_none());
    assert!(bed.host.of_parent("/", Want::CPU).is_none(), "the node is no pod");
}

#[test]
fn this_process_has_figures() {
    let f = Host::default().of_container("", std::process::id(), Want::ALL).unwrap();
    assert!(f.at_ns > 0 && f.cpu.unwrap().usage_ns > 0 && !f.processes.is_empty());
}
