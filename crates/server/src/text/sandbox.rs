//! Chat templates in processes of their own.
//!
//! Fuel bounds how many instructions a template runs, but one instruction may double a string, nest a list in itself or
//! compare two such lists: forty of them ask for more memory, or more time, than there is. Nothing inside a process can
//! take that back, so the server renders in child processes whose memory and processor time the system bounds and which
//! it kills when they take too long. They end with the server, even when that is killed. A child serves one prompt after another; one that misbehaved is replaced.

use std::io::{self, BufRead, Write};
use std::path::PathBuf;
use std::process::{ExitCode, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::Semaphore;

use super::{ChatTemplate, RenderInput, TemplateError};

/// The argument that makes the `sparseserve` binary a child of a sandbox; no verb for users.
pub const RENDER_VERB: &str = "__render-templates";

/// Address space of a child. The largest request there may be takes some hundred MiB.
const MEMORY_BYTES_MAX: u64 = 512 << 20;
/// Time for one prompt. Real templates take milliseconds.
const RENDER_TIME_MAX: Duration = Duration::from_secs(10);
/// Processor time after which a child ends by itself, beyond the time that it has: for when nobody is left to kill it.
const EXTRA_SECONDS: u64 = 2;
/// Children at the same time.
const NUM_CHILDREN_MAX: usize = 2;

/// A chat template that can harm nobody.
pub struct Sandbox {
    template: Arc<ChatTemplate>,
    program: PathBuf,
    time: Duration,
    permits: Semaphore,
    idle: Mutex<Vec<Renderer>>,
    num_started: AtomicUsize,
}

/// The first line to a child: the template.
#[derive(Serialize, Deserialize)]
struct Setup {
    source: String,
    bos_token: String,
    eos_token: String,
    /// Processor time for each prompt.
    cpu_seconds: u64,
}

impl Sandbox {
    /// Renders `template` in children that run `program`, which is the `sparseserve` binary.
    pub fn new(template: Arc<ChatTemplate>, program: PathBuf) -> Self {
        let (permits, idle) = (Semaphore::new(NUM_CHILDREN_MAX), Mutex::default());
        let (time, num_started) = (RENDER_TIME_MAX, AtomicUsize::new(0));
        Sandbox { template, program, time, permits, idle, num_started }
    }

    /// The same with another bound on the time for one prompt.
    pub fn with_time(self, time: Duration) -> Self {
        Sandbox { time, ..self }
    }

    /// Children that were started so far.
    pub fn num_started(&self) -> usize {
        self.num_started.load(Ordering::Relaxed)
    }

    /// The same where this program is the `sparseserve` binary.
    ///
    /// # Errors
    /// If the system does not tell which program this is.
    pub fn of_this_program(template: Arc<ChatTemplate>) -> io::Result<Self> {
        // On Linux this is the very file that runs, even when an upgrade has replaced it on disk.
        let running = PathBuf::from("/proc/self/exe");
        let program = if running.exists() { running } else { std::env::current_exe()? };
        Ok(Sandbox::new(template, program))
    }

    /// The template, for questions about it.
    pub fn template(&self) -> &ChatTemplate {
        &self.template
    }

    /// The prompt for `input`.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`], and [`TemplateError::Limit`] for too much time or memory.
    pub async fn render(&self, input: &RenderInput) -> Result<String, TemplateError> {
        // The semaphore is never closed, so there is always a permit to wait for.
        let _permit = self.permits.acquire().await;
        let request = to_line(input)?;
        let reused = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        if let Some(renderer) = reused {
            // It may have died while it was idle, which is no fault of this request. One that takes too long has not.
            if let Some(answer) = self.ask(renderer, &request).await {
                return answer;
            }
        }
        let renderer = self.spawn().await.map_err(|e| TemplateError::Failed(format!("no process: {e}")))?;
        let out_of_memory = || Err(TemplateError::Limit(format!("{} MiB of memory", MEMORY_BYTES_MAX >> 20)));
        self.ask(renderer, &request).await.unwrap_or_else(out_of_memory)
    }

    async fn spawn(&self) -> io::Result<Renderer> {
        let mut child = Command::new(&self.program)
            .arg(RENDER_VERB)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            // Ctrl-C in a terminal is for the server, which still answers while it drains.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(io::Error::other("a child without pipes"));
        };
        let mut renderer = Renderer { _child: child, stdin, stdout: BufReader::new(stdout) };
        self.num_started.fetch_add(1, Ordering::Relaxed);
        let cpu_seconds = self.time.as_secs() + EXTRA_SECONDS;
        let setup = to_line(&self.template.setup(cpu_seconds)).map_err(io::Error::other)?;
        renderer.stdin.write_all(&setup).await?;
        Ok(renderer)
    }

    /// The answer of `renderer`, or `None` if it is gone.
    async fn ask(&self, mut renderer: Renderer, request: &[u8]) -> Option<Result<String, TemplateError>> {
        match tokio::time::timeout(self.time, renderer.ask(request)).await {
            Ok(Ok(answer)) => {
                self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(renderer);
                Some(answer)
            }
            Ok(Err(_)) => None,
            Err(_) => Some(Err(TemplateError::Limit(format!("{:?}", self.time)))),
        }
    }
}

impl std::fmt::Debug for Sandbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sandbox").field("program", &self.program).finish_non_exhaustive()
    }
}

/// A child. Dropping it kills it.
struct Renderer {
    _child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Renderer {
    /// Sends a line and reads the answer; an error means that the child is gone.
    async fn ask(&mut self, request: &[u8]) -> io::Result<Result<String, TemplateError>> {
        self.stdin.write_all(request).await?;
        let mut answer = String::new();
        self.stdout.read_line(&mut answer).await?;
        Ok(serde_json::from_str(&answer)?)
    }
}

fn to_line(value: &impl Serialize) -> Result<Vec<u8>, TemplateError> {
    let mut line = serde_json::to_vec(value).map_err(|e| TemplateError::Failed(e.to_string()))?;
    line.push(b'\n');
    Ok(line)
}

/// The child's main function: renders what comes in on standard input until that ends.
pub fn render_main() -> ExitCode {
    match render_lines() {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn render_lines() -> io::Result<()> {
    // Where the system does not do that, the limit on processor time must do.
    let _ = end_with_parent();
    let limit = |most| Rlimit { current: Some(most), maximum: Some(most) };
    setrlimit(Resource::As, limit(MEMORY_BYTES_MAX))?;
    // Running out of memory ends in an abort, which is no reason for a core dump.
    setrlimit(Resource::Core, limit(0))?;
    let mut lines = io::stdin().lock().lines();
    let Some(setup) = lines.next().transpose()? else { return Ok(()) };
    let Setup { source, bos_token, eos_token, cpu_seconds } = serde_json::from_str(&setup)?;
    let template = ChatTemplate::new(&source, &bos_token, &eos_token);
    let mut out = io::stdout().lock();
    for line in lines {
        let line = line?;
        limit_cpu_seconds(cpu_seconds)?;
        let input: RenderInput = serde_json::from_str(&line)?;
        let answer = match &template {
            Ok(template) => template.render(&input),
            Err(error) => Err(error.clone()),
        };
        serde_json::to_writer(&mut out, &answer)?;
        out.write_all(b"\n")?;
        out.flush()?;
    }
    Ok(())
}

/// Ends the process when it takes `seconds` more of processor time. The server kills it sooner, if it still can.
fn limit_cpu_seconds(seconds: u64) -> io::Result<()> {
    let used = u64::try_from(clock_gettime(ClockId::ProcessCPUTime).tv_sec).unwrap_or(0);
    // The hard limit stays, so that the soft one can be moved for the next prompt.
    let Rlimit { maximum, .. } = getrlimit(Resource::Cpu);
    let current = maximum.unwrap_or(u64::MAX).min(used + seconds);
    Ok(setrlimit(Resource::Cpu, Rlimit { current: Some(current), maximum })?)
}

/// Has the system kill this process when the server ends, however it does.
#[cfg(target_os = "linux")]
fn end_with_parent() -> io::Result<()> {
    Ok(rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?)
}

#[cfg(not(target_os = "linux"))]
fn end_with_parent() -> io::Result<()> {
    Ok(())
}

impl ChatTemplate {
    fn setup(&self, cpu_seconds: u64) -> Setup {
        let [source, bos_token, eos_token] = self.parts().map(str::to_owned);
        Setup { source, bos_token, eos_token, cpu_seconds }
    }
}
