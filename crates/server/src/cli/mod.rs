//! The command line: what the user typed becomes resolved settings, and settings become a running command.

mod cgroup;
mod demo;
mod failure;
mod hub;
mod load;
mod log;
mod options;
mod plan;
mod runner;
mod settings;
mod size;
