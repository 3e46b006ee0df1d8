//! How much memory this process may use: the smallest of the machine's memory and every control group around the
//! process, version 1 or 2. In a container the host's memory says nothing.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// The memory limit and where it comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryLimit {
    /// Bytes.
    pub bytes: u64,
    /// The file that says so.
    pub source: LimitSource,
}

/// Who sets a limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LimitSource {
    /// The memory of the machine.
    Machine,
    /// A control group, by its limit file.
    Cgroup(PathBuf),
    /// The system does not say.
    Unknown,
}

impl fmt::Display for LimitSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LimitSource::Machine => f.write_str("memory of the machine"),
            LimitSource::Cgroup(file) => write!(f, "control group, {}", file.display()),
            LimitSource::Unknown => f.write_str("not known"),
        }
    }
}

/// The limit for this process; `root` is `/` except in tests. `None` where the system does not say (no `/proc`).
pub fn memory_limit(root: &Path) -> Option<MemoryLimit> {
    let machine = machine_bytes(root).map(|bytes| MemoryLimit { bytes, source: LimitSource::Machine });
    let groups = limit_files(root).into_iter().filter_map(|file| {
        let bytes = fs::read_to_string(root.join(&file)).ok()?.trim().parse().ok()?;
        Some(MemoryLimit { bytes, source: LimitSource::Cgroup(Path::new("/").join(file)) })
    });
    // Ties go to the machine: version 1 writes a huge number where nothing is limited.
    machine.into_iter().chain(groups).min_by_key(|limit| limit.bytes)
}

fn machine_bytes(root: &Path) -> Option<u64> {
    let meminfo = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Files that may hold a limit of this process, relative to the root directory: of its own group and of all above it.
fn limit_files(root: &Path) -> Vec<PathBuf> {
    let (Ok(groups), Ok(mounts)) = (
        fs::read_to_string(root.join("proc/self/cgroup")),
        fs::read_to_string(root.join("proc/self/mountinfo")),
    ) else {
        return Vec::new();
    };
    let mut files = Vec::new();
    for mount in mounts.lines().filter_map(Mount::parse) {
        // `hierarchy:controllers:path`; version 2 is `0::path`.
        let path = groups.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':');
            let (hierarchy, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
            let ours = match mount.version {
                1 => controllers.split(',').any(|c| c == "memory"),
                _ => hierarchy == "0" && controllers.is_empty(),
            };
            ours.then_some(path)
        });
        let Some(path) = path else { continue };
        // Inside a container the mount may show only part of the tree that the path is told from.
        let below_mount = Path::new(path).strip_prefix(mount.tree_root).unwrap_or(Path::new(""));
        let name = if mount.version == 1 { "memory.limit_in_bytes" } else { "memory.max" };
        let point = Path::new(mount.point).strip_prefix("/").unwrap_or(Path::new(mount.point));
        files.extend(below_mount.ancestors().map(|group| point.join(group).join(name)));
    }
    files
}

/// A mounted control-group tree, from a line of `/proc/self/mountinfo`.
struct Mount<'a> {
    version: u8,
    /// Which part of the tree is mounted.
    tree_root: &'a str,
    /// Where.
    point: &'a str,
}

impl<'a> Mount<'a> {
    /// `id parent device root point options [tags] - type source options`
    fn parse(line: &'a str) -> Option<Self> {
        let (before, after) = line.split_once(" - ")?;
        let mut before = before.split(' ').skip(3);
        let (tree_root, point) = (before.next()?, before.next()?);
        let mut after = after.split(' ');
        let version = match after.next()? {
            "cgroup2" => 2,
            "cgroup" if after.nth(1)?.split(',').any(|option| option == "memory") => 1,
            _ => return None,
        };
        Some(Mount { version, tree_root, point })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMINFO: &str = "MemTotal:       16384 kB\nMemFree:        1 kB\n";
    const MACHINE: u64 = 16 << 20;

    /// The limit in a tree of `(path, content)` files.
    fn limit(files: &[(&str, &str)]) -> Option<MemoryLimit> {
        let root = tempfile::tempdir().expect("a temporary directory");
        for (path, content) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().expect("a parent")).expect("directories");
            fs::write(path, content).expect("a file");
        }
        memory_limit(root.path())
    }

    fn cgroup(bytes: u64, file: &str) -> Option<MemoryLimit> {
        Some(MemoryLimit { bytes, source: LimitSource::Cgroup(file.into()) })
    }

    #[test]
    fn nothing_known() {
        assert_eq!(limit(&[]), None);
    }

    #[test]
    fn version_2_takes_the_smallest_on_the_way_up() {
        let mount = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
        let files = [
            ("proc/meminfo", MEMINFO),
            ("proc/self/cgroup", "0::/user.slice/app.service\n"),
            ("proc/self/mountinfo", mount),
            ("sys/fs/cgroup/user.slice/memory.max", "4194304\n"),
            ("sys/fs/cgroup/user.slice/app.service/memory.max", "max\n"),
        ];
        assert_eq!(limit(&files), cgroup(4 << 20, "/sys/fs/cgroup/user.slice/memory.max"));
        let machine = MemoryLimit { bytes: MACHINE, source: LimitSource::Machine };
        assert_eq!(limit(&files[..3]), Some(machine));
    }

    #[test]
    fn version_2_in_a_container_with_its_own_namespace() {
        let files = [
            ("proc/meminfo", MEMINFO),
            ("proc/self/cgroup", "0::/\n"),
            ("proc/self/mountinfo", "30 23 0:26 / /sys/fs/cgroup ro - cgroup2 cgroup rw\n"),
            ("sys/fs/cgroup/memory.max", "2097152\n"),
        ];
        assert_eq!(limit(&files), cgroup(2 << 20, "/sys/fs/cgroup/memory.max"));
    }

    #[test]
    fn version_1_in_a_container_that_sees_its_part_of_the_tree() {
        let files = [
            ("proc/meminfo", MEMINFO),
            ("proc/self/cgroup", "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/system\n"),
            (
                "proc/self/mountinfo",
                "33 31 0:30 /docker/abc /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n\
                 35 31 0:32 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
            ),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "1048576\n"),
        ];
        assert_eq!(limit(&files), cgroup(1 << 20, "/sys/fs/cgroup/memory/memory.limit_in_bytes"));
    }

    #[test]
    fn version_1_without_a_limit_writes_a_huge_number() {
        let files = [
            ("proc/meminfo", MEMINFO),
            ("proc/self/cgroup", "4:memory:/\n"),
            ("proc/self/mountinfo", "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
        ];
        assert_eq!(limit(&files).map(|l| l.bytes), Some(MACHINE));
    }
}
