/** What happens to a task. Either a state, or an event of the task's own. */
export interface TaskEvent {
  task_id: string;
  /** The number of the event; a later one is higher. None from a worker without the library. */
  id?: number;
  /** When, in seconds since 1970. */
  time?: number;
  state?: "PENDING" | "STARTED" | "PROGRESS" | "RETRY" | "SUCCESS" | "FAILURE" | "REVOKED" | string;
  /** The value of a SUCCESS; what a PROGRESS reports: `{current, total, message}`. */
  result?: unknown;
  error?: string;
  /** The same for programs. */
  code?: string;
  /** When a RETRY is due, in seconds since 1970. */
  retry_at?: number;
  /** Why a PENDING task may not begin soon. */
  waiting?: string;
  /** False where events before this state are lost. */
  recovered?: false;
  /** The name of an event of the task's own. */
  event?: string;
  data?: unknown;
}

export interface WatchOptions {
  /**
   * Called with every event, in order, each once, the terminal one last. Where only asking comes
   * through these are states, and `recovered` is false if there was something between two.
   */
  onEvent?: (event: TaskEvent) => void;
  /** Called each time a connection was lost or none came about; another follows, after a pause. */
  onLost?: () => void;
  /** Where the routes are, seen from the page; "" by default. */
  base?: string;
  /** A read token, for pages of another origin. */
  token?: string;
  /** Begin after this event; if that was the end, `watchTask` resolves with it. */
  after?: number;
  /** Stop watching; the promise is rejected with the signal's reason. */
  signal?: AbortSignal;
  /** The ways to try, in order; all of them by default. */
  transports?: ("websocket" | "sse" | "poll")[];
}

/**
 * Follow a task; resolves with its terminal event. Rejects with UnknownTask where the server knows
 * of none, or shows this one to others only, and with Refused where trying again is of no use.
 */
export function watchTask(id: string, options?: WatchOptions): Promise<TaskEvent>;

export class UnknownTask extends Error {}
export class Refused extends Error {}

/** `<task-status task-id="…" base="…" token="…">`, which fires `task-event` with each event. */
export class TaskStatusElement extends HTMLElement {}

/** The states with which a task ends. */
export const TERMINAL: Set<string>;
/** Wait so many milliseconds, or until the browser is online again. Rejects once `signal` does. */
export function pause(milliseconds: number, signal?: AbortSignal): Promise<void>;
/** A pause that grows with the number of failures before it, up to five seconds. */
export function backOff(failures: number, signal?: AbortSignal): Promise<void>;
