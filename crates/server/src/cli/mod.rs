//! The command line: what the user typed becomes resolved settings, and settings become a running command.

mod cgroup;
mod failure;
mod options;
mod plan;
mod size;
